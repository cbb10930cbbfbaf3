# placeholder until the modelling file lands
