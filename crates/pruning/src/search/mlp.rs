//! A small regression network over masks: one hidden layer of tanh, trained with Adam on the squared error. In f64, on one thread.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Hidden units.
const HIDDEN: usize = 32;
/// Passes over the examples, and examples of one step.
const EPOCHS: usize = 200;
const BATCH: usize = 32;
/// Adam's rate at the start (it falls as a cosine), decays and guard (arXiv 1412.6980, algorithm 1).
const RATE: f64 = 1e-2;
const DECAYS: (f64, f64) = (0.9, 0.999);
const GUARD: f64 = 1e-8;

/// f(mask) = v . tanh(W mask + b) + c, in units of the targets.
pub(super) struct Mlp {
    inputs: usize,
    /// W [HIDDEN, inputs], b [HIDDEN], v [HIDDEN], c.
    parameters: Vec<f64>,
    /// Mean and standard deviation of the targets.
    scale: (f64, f64),
}

impl Mlp {
    /// Learns from masks, all of the same length, and their values.
    pub fn fit(examples: &[(Vec<bool>, f64)], rng: &mut ChaCha8Rng) -> Self {
        let inputs = examples.first().map_or(0, |(mask, _)| mask.len());
        let n = examples.len().max(1) as f64;
        let mean = examples.iter().map(|(_, y)| y).sum::<f64>() / n;
        let deviation = (examples.iter().map(|(_, y)| (y - mean).powi(2)).sum::<f64>() / n).sqrt().max(1e-12);
        let bound = (1.0 / inputs.max(1) as f64).sqrt();
        let count = HIDDEN * inputs + 2 * HIDDEN + 1;
        let output = HIDDEN * inputs + HIDDEN;
        let start = |i: usize, rng: &mut ChaCha8Rng| match i {
            i if i < HIDDEN * inputs => rng.random_range(-bound..=bound),
            i if i >= output && i + 1 < count => rng.random_range(-1.0..=1.0) / (HIDDEN as f64).sqrt(),
            _ => 0.0,
        };
        let parameters = (0..count).map(|i| start(i, rng)).collect();
        let mut model = Self { inputs, parameters, scale: (mean, deviation) };
        let mut adam = Adam { first: vec![0.0; count], second: vec![0.0; count], steps: 0 };
        let mut order: Vec<usize> = (0..examples.len()).collect();
        for epoch in 0..EPOCHS {
            order.shuffle(rng);
            let rate = RATE * 0.5 * (1.0 + (std::f64::consts::PI * epoch as f64 / EPOCHS as f64).cos());
            for batch in order.chunks(BATCH) {
                let mut gradient = vec![0.0; count];
                for i in batch {
                    model.add_gradient(&examples[*i].0, (examples[*i].1 - mean) / deviation, &mut gradient);
                }
                gradient.iter_mut().for_each(|g| *g /= batch.len() as f64);
                adam.step(&mut model.parameters, &gradient, rate);
            }
        }
        model
    }

    /// The value of a mask.
    pub fn predict(&self, mask: &[bool]) -> f64 {
        let (mean, deviation) = self.scale;
        mean + deviation * self.forward(mask).1
    }

    /// Hidden activations, and the output before it is scaled.
    fn forward(&self, mask: &[bool]) -> ([f64; HIDDEN], f64) {
        let (weights, rest) = self.parameters.split_at(HIDDEN * self.inputs);
        let mut hidden = [0.0; HIDDEN];
        for (h, activation) in hidden.iter_mut().enumerate() {
            let row = &weights[h * self.inputs..(h + 1) * self.inputs];
            *activation = (rest[h] + row.iter().zip(mask).filter(|(_, on)| **on).map(|(w, _)| w).sum::<f64>()).tanh();
        }
        let output = rest[2 * HIDDEN] + hidden.iter().zip(&rest[HIDDEN..2 * HIDDEN]).map(|(a, v)| a * v).sum::<f64>();
        (hidden, output)
    }

    /// Adds the gradient of the squared error of one example.
    fn add_gradient(&self, mask: &[bool], target: f64, gradient: &mut [f64]) {
        let (hidden, output) = self.forward(mask);
        let error = 2.0 * (output - target);
        let biases = HIDDEN * self.inputs;
        let outputs = biases + HIDDEN;
        for (h, activation) in hidden.iter().enumerate() {
            let back = error * self.parameters[outputs + h] * (1.0 - activation * activation);
            gradient[outputs + h] += error * activation;
            gradient[biases + h] += back;
            let row = &mut gradient[h * self.inputs..(h + 1) * self.inputs];
            row.iter_mut().zip(mask).filter(|(_, on)| **on).for_each(|(g, _)| *g += back);
        }
        gradient[outputs + HIDDEN] += error;
    }
}

/// Adam's running moments.
struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Adam {
    fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rate: f64) {
        self.steps += 1;
        let unbias = (1.0 - DECAYS.0.powi(self.steps), 1.0 - DECAYS.1.powi(self.steps));
        for (i, g) in gradient.iter().enumerate() {
            self.first[i] = DECAYS.0 * self.first[i] + (1.0 - DECAYS.0) * g;
            self.second[i] = DECAYS.1 * self.second[i] + (1.0 - DECAYS.1) * g * g;
            parameters[i] -= rate * (self.first[i] / unbias.0) / ((self.second[i] / unbias.1).sqrt() + GUARD);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::round_rng;

    #[test]
    fn it_learns_a_sum_with_a_pair_that_needs_the_hidden_layer() {
        let masks = (0..64u32).map(|i| (0..6).map(|b| i >> b & 1 == 1).collect::<Vec<bool>>());
        let value = |m: &[bool]| f64::from(u8::from(m[0])) * 0.5 + f64::from(u8::from(m[3])) * 0.2 + if m[1] && m[2] { 1.0 } else { 0.0 };
        let examples: Vec<(Vec<bool>, f64)> = masks.map(|m| (m.clone(), value(&m))).collect();
        let model = Mlp::fit(&examples, &mut round_rng(1, 0));
        let worst = examples.iter().map(|(m, y)| (model.predict(m) - y).abs()).fold(0.0, f64::max);
        assert!(worst < 0.1, "{worst}");
        assert_eq!(model.predict(&examples[9].0), Mlp::fit(&examples, &mut round_rng(1, 0)).predict(&examples[9].0));
    }
}
