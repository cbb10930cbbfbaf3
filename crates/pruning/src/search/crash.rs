//! CRaSh's first two steps (arXiv 2310.15477, section 4): **c**luster neighbouring layers by how alike their outputs are, **r**emove all but one of
//! each cluster. Likeness is linear CKA (Kornblith et al., arXiv 1905.00414, section 3); of two neighbouring clusters it is the mean over their pairs
//! of layers, and the most alike two are merged until the budget holds. The first layer of a cluster stays: the one whose input is the least changed.

use super::{Found, Progress, Strategy, one_shot, whole_layers};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::stream::Passage;
use candle_core::{DType, Device, Tensor};
use evop_model::kernels;
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of a pack that are compared: a [tokens, tokens] matrix a layer is held.
const MOST_TOKENS: usize = 1_024;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let layers = whole_layers(space, Strategy::Crash)?;
    let last = (0..2 * layers).rev().find(|s| space.dense().keeps(*s)).unwrap_or(0);
    let mut products = vec![vec![0.0; layers]; layers];
    let mut outputs: Vec<Vec<f32>> = vec![Vec::new(); layers];
    evaluator.visit(space.dense(), |s, Passage { after, .. }| {
        // a layer's last sub-block overwrites what its first one left
        outputs[s / 2] = token_products(after)?;
        if s == last {
            add_products(&outputs, &mut products);
        }
        Ok(())
    })?;
    one_shot(evaluator, space, &clustered(space, &cka(&products)), on_round)
}

/// Inner products of all pairs of rows of x [tokens, hidden], its columns centred: K = X X^T.
fn token_products(x: &Tensor) -> Result<Vec<f32>> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let x = x.narrow(0, 0, x.dim(0)?.min(MOST_TOKENS))?;
    let centred = x.broadcast_sub(&x.mean_keepdim(0)?)?;
    Ok(kernels::matmul::linear(&centred, &centred)?.flatten_all()?.to_vec1()?)
}

/// Adds <K_i, K_j>, which is ||X_i^T X_j||^2, of all pairs of layers.
fn add_products(outputs: &[Vec<f32>], products: &mut [Vec<f64>]) {
    products.par_iter_mut().enumerate().for_each(|(i, row)| {
        for (j, product) in row.iter_mut().enumerate() {
            *product += outputs[i].iter().zip(&outputs[j]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        }
    });
}

/// <K_i, K_j> / (||K_i|| ||K_j||): 1 for the same representation up to rotation and scale.
fn cka(products: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let norm = |i: usize| products[i][i].sqrt();
    (0..products.len()).map(|i| (0..products.len()).map(|j| products[i][j] / (norm(i) * norm(j)).max(f64::MIN_POSITIVE)).collect()).collect()
}

/// Merges the most alike neighbours until one layer of each cluster fits.
fn clustered(space: &SearchSpace, cka: &[Vec<f64>]) -> Genome {
    let mut clusters: Vec<Range<usize>> = (0..cka.len()).map(|l| l..l + 1).collect();
    let genome = |clusters: &[Range<usize>]| {
        let mut genome: Genome = vec![0; cka.len()];
        clusters.iter().for_each(|cluster| genome[cluster.start] = 1);
        genome
    };
    let likeness = |a: &Range<usize>, b: &Range<usize>| -> f64 {
        let sum: f64 = a.clone().flat_map(|i| b.clone().map(move |j| (i, j))).map(|(i, j)| cka[i][j]).sum();
        sum / (a.len() * b.len()) as f64
    };
    while clusters.len() > 1 && !space.fits(&genome(&clusters)) {
        let pair = (1..clusters.len()).reduce(|best, other| {
            let of = |at: usize| likeness(&clusters[at - 1], &clusters[at]);
            if of(other) > of(best) { other } else { best }
        });
        let Some(at) = pair else { break };
        let merged = clusters.remove(at);
        clusters[at - 1].end = merged.end;
    }
    genome(&clusters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Resource};
    use crate::space::{Grid, Space, SpaceOptions};
    use crate::testing::normal;
    use evop_model::Config;

    fn likeness(x: &Tensor, y: &Tensor) -> f64 {
        let outputs = [token_products(x).unwrap(), token_products(y).unwrap()];
        let mut products = vec![vec![0.0; 2]; 2];
        add_products(&outputs, &mut products);
        cka(&products)[0][1]
    }

    #[test]
    fn cka_sees_neither_rotation_nor_scale_nor_offset_and_tells_others_apart() {
        let x = normal(1, 0.0, 1.0, (200, 4));
        assert!((likeness(&x, &x) - 1.0).abs() < 1e-6);
        let rotation = Tensor::new(&[[0.6f32, 0.8, 0.0, 0.0], [-0.8, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], &Device::Cpu).unwrap();
        let turned = ((x.matmul(&rotation).unwrap() * 3.0).unwrap() + 5.0).unwrap();
        assert!((likeness(&x, &turned) - 1.0).abs() < 1e-4);
        let other = normal(2, 0.0, 1.0, (200, 4));
        assert!(likeness(&x, &other) < 0.2);
        // by hand: x = (-1, 0, 1), y = (1, -2, 1) have x . y = 0; z = (-1, -1, 2) has (x . z)^2 / (|x|^2 |z|^2) = 9 / 12
        let column = |v: [f32; 3]| Tensor::new(&v, &Device::Cpu).unwrap().reshape((3, 1)).unwrap();
        assert!(likeness(&column([-1.0, 0.0, 1.0]), &column([1.0, -2.0, 1.0])).abs() < 1e-9);
        assert!((likeness(&column([-1.0, 0.0, 1.0]), &column([-1.0, -1.0, 2.0])) - 0.75).abs() < 1e-6);
    }

    #[test]
    fn the_most_alike_neighbours_are_merged_and_the_first_of_each_cluster_stays() {
        let config = Config::from_json(
            r#"{"model_type":"llama","vocab_size":8,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":6,"num_attention_heads":2,"max_position_embeddings":16}"#,
            std::path::Path::new("config.json"),
        )
        .unwrap();
        let budgets = vec![Budget::new(Resource::Params, 0.5).unwrap()];
        let space = SearchSpace::new(&config, &SpaceOptions { space: Space::Layer, uniform: false, grid: Grid::default(), budgets }, None).unwrap();
        // 1 and 2 are most alike, then 4 and 5, then {1, 2} and 3
        let mut cka = vec![vec![0.1; 6]; 6];
        for (i, j, value) in [(1, 2, 0.99), (4, 5, 0.95), (2, 3, 0.97), (1, 3, 0.8)] {
            (cka[i][j], cka[j][i]) = (value, value);
        }
        assert_eq!(clustered(&space, &cka), [1, 1, 0, 0, 1, 0]);
    }
}
