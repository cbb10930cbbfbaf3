//! What the machine multiplies: the bound of all that is products.

use super::search::seconds;
use anyhow::Result;
use evop_model::{Decoder, Held, Linear, Tensor};
use std::hint::black_box;

/// The product that the rate is measured with: 1,024 rows by a square matrix, in the type that a decoder's weights are held in.
pub const ROWS: usize = 1_024;
/// Of the matrix.
pub const SIDE: usize = 2_048;

/// Such a product.
pub struct Matmul<'d> {
    decoder: &'d Decoder,
    x: Tensor,
    layer: Linear,
}

impl<'d> Matmul<'d> {
    /// Random numbers; one product is made, to warm caches up.
    pub fn new(decoder: &'d Decoder) -> Result<Self> {
        let x = Tensor::randn(0f32, 1.0, (ROWS, SIDE), decoder.device())?.to_dtype(decoder.dtype())?;
        let held = (0..decoder.last_boundary()).find_map(|s| decoder.sub_block(s)).map_or(Held::Plain(decoder.dtype()), |block| block.output().held());
        let layer = Linear::new(Tensor::randn(0f32, 1.0, (SIDE, SIDE), decoder.device())?, None)?.held_in(held)?;
        let matmul = Self { decoder, x, layer };
        matmul.gflops()?;
        Ok(matmul)
    }

    /// GFLOP/s of one product.
    pub fn gflops(&self) -> Result<f64> {
        let product = || -> Result<()> {
            black_box(self.layer.forward(&self.x)?);
            Ok(())
        };
        Ok((2 * ROWS * SIDE * SIDE) as f64 / 1e9 / seconds(self.decoder, &product)?)
    }
}
