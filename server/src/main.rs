//! EvoP.
fn main() {}
