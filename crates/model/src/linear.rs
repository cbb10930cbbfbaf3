//! Linear layers and norms: the one place where number types, widths and biases are decided.

use crate::Result;
use crate::config::NormKind;
use crate::held::{Held, WeightType};
use crate::kernels::packed::{Format, Weights};
use crate::matrix::Matrix;
use crate::source::{Source, bias_of};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops;

/// What a model is held and computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Types {
    /// The matrices.
    pub weights: WeightType,
    /// Everything else: activations, norms, biases, caches.
    pub compute: DType,
}

impl Types {
    /// The same type for both, but on the CPU, where all matrices are multiplied into f32 sums.
    pub fn on(device: &Device, weights: WeightType) -> Result<Self> {
        Ok(Self { weights, compute: if device.is_cpu() { DType::F32 } else { weights.plain()? } })
    }
}

/// y = x W^T + b.
#[derive(Debug, Clone)]
pub struct Linear {
    /// [out, in]; may be a view of a larger matrix.
    weight: Matrix,
    /// [out].
    bias: Option<Tensor>,
}

impl Linear {
    /// Loads `name` (`….weight`) of shape [out, in] as `held` and its bias, which must be there when `bias` says so, as `compute`.
    pub(crate) fn load(source: &dyn Source, name: &str, [out, input]: [usize; 2], bias: bool, held: Held, compute: DType, device: &Device) -> Result<Self> {
        let weight = Matrix::load(source, name, [out, input], held, device)?;
        let bias_name = bias_of(name);
        let bias = if bias || source.shape(&bias_name).is_some() { Some(source.load(&bias_name, &[out], compute, device)?) } else { None };
        Ok(Self { weight, bias })
    }

    /// A layer over a weight of shape [out, in] and a bias of shape [out].
    ///
    /// # Errors
    /// [`crate::Error::Input`] for other shapes.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let out = weight.dims2()?.0;
        match bias.as_ref().map(Tensor::dims) {
            Some([b]) if *b != out => Err(crate::Error::Input(format!("a linear layer of {out} outputs was given a bias of [{b}]"))),
            None | Some([_]) => Ok(Self { weight: Matrix::new(weight)?, bias }),
            Some(other) => Err(crate::Error::Input(format!("a linear layer of {out} outputs was given a bias of shape {other:?}"))),
        }
    }

    /// A layer over the same memory as a matrix, without a bias.
    pub(crate) fn over(weight: Matrix) -> Self {
        Self { weight, bias: None }
    }

    /// The weight as the bf16 kernels read it, where it is held so and there is no bias.
    pub(crate) fn bf16(&self) -> Option<Weights<'_>> {
        match &self.weight {
            Matrix::Packed(of) if self.bias.is_none() => Some(of.weights()).filter(|w| w.format == Format::Bf16),
            _ => None,
        }
    }

    /// The same layer, its weight held in another type.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when memory runs out.
    pub fn held_in(&self, held: Held) -> Result<Self> {
        Ok(Self { weight: Matrix::of(&self.weight()?, held)?, bias: self.bias.clone() })
    }

    /// All of these over one input as a single layer, and they themselves as views of it, where one product is faster than several: plain matrices of one
    /// type on a GPU. Elsewhere they stay as they are.
    pub(crate) fn joined<const N: usize>(layers: [Self; N]) -> Result<(Option<Self>, [Self; N])> {
        let Some(weight) = Matrix::joined(layers.each_ref().map(|l| &l.weight))? else { return Ok((None, layers)) };
        let biases: Vec<&Tensor> = layers.iter().filter_map(|l| l.bias.as_ref()).collect();
        if !biases.is_empty() && biases.len() < N {
            return Ok((None, layers));
        }
        let bias = if biases.is_empty() { None } else { Some(Tensor::cat(&biases, 0)?) };
        let joint = Self { weight, bias };
        let mut first = 0;
        let views = layers.into_iter().map(|layer| {
            first += layer.outputs();
            Ok(Self { weight: Matrix::new(joint.weight.rows_at(first - layer.outputs()..first)?)?, bias: layer.bias })
        });
        let views = views.collect::<Result<Vec<_>>>()?.try_into().map_err(|_| crate::Error::Input("a layer was lost".into()))?;
        Ok((Some(joint), views))
    }

    /// What the weight is held in.
    pub fn held(&self) -> Held {
        self.weight.held()
    }

    /// Bytes of the weight.
    pub fn weight_bytes(&self) -> usize {
        self.held().bytes(self.outputs(), self.inputs())
    }

    /// The bias, [out].
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The same weight with this bias, [out].
    pub(crate) fn with_bias(&self, bias: Tensor) -> Self {
        Self { weight: self.weight.clone(), bias: Some(bias) }
    }

    /// The first `out` rows, as a view.
    pub(crate) fn narrow_out(&self, out: usize) -> Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.narrow(0, 0, out)).transpose()?;
        Ok(Self { weight: self.weight.narrow_rows(out)?, bias })
    }

    /// The first `input` columns, as a view; a copy where the device's products take whole matrices only.
    pub(crate) fn narrow_in(&self, input: usize) -> Result<Self> {
        Ok(Self { weight: self.weight.narrow_columns(input)?, bias: self.bias.clone() })
    }

    /// Rows in another order (or some of them), as a copy.
    pub(crate) fn select_out(&self, rows: &[u32]) -> Result<Self> {
        let weight = self.weight()?.contiguous()?;
        let index = Tensor::from_slice(rows, rows.len(), weight.device())?;
        let bias = self.bias.as_ref().map(|b| b.index_select(&index, 0)).transpose()?;
        Self::new(weight.index_select(&index, 0)?, bias)
    }

    /// Columns in another order (or some of them), as a copy.
    pub(crate) fn select_in(&self, columns: &[u32]) -> Result<Self> {
        let weight = self.weight()?.contiguous()?;
        let index = Tensor::from_slice(columns, columns.len(), weight.device())?;
        Self::new(weight.index_select(&index, 1)?, self.bias.clone())
    }

    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        self.weight.rows()
    }

    /// Columns of the weight.
    pub fn inputs(&self) -> usize {
        self.weight.columns()
    }

    /// x [rows, in] -> [rows, out]. On the CPU a row's result doesn't depend on the other rows (`kernels::matmul`).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = Self::forward_all([self], x)?;
        Ok(y)
    }

    /// Several layers over the same x, in one go on the CPU.
    pub(crate) fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let products = Matrix::products(layers.map(|l| &l.weight), x)?;
        let biased = layers.iter().zip(products).map(|(l, y)| l.biased(y)).collect::<Result<Vec<_>>>()?;
        biased.try_into().map_err(|_| crate::Error::Input("a layer was lost".into()))
    }

    fn biased(&self, y: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// The weight, [out, in].
    pub(crate) fn matrix(&self) -> &Matrix {
        &self.weight
    }

    /// The weight in plain numbers, [out, in]: shared memory, or a copy in f32 of a quantised one.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when memory runs out.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.tensor()
    }
}

/// RMS norm or LayerNorm over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    /// LayerNorm's.
    bias: Option<Tensor>,
    eps: f32,
    /// Whether files have its parameters (a LayerNorm without any is computed with ones and zeros).
    stored: bool,
}

impl Norm {
    pub(crate) fn load(source: &dyn Source, name: &str, width: usize, kind: NormKind, eps: f64, dtype: DType, device: &Device) -> Result<Self> {
        let load = |name: &str| source.load(name, &[width], dtype, device);
        let (weight, bias) = match kind {
            NormKind::Rms => (load(name)?, None),
            NormKind::Layer { affine: true } => (load(name)?, Some(load(&bias_of(name))?)),
            NormKind::Layer { affine: false } => (Tensor::ones(width, dtype, device)?, Some(Tensor::zeros(width, dtype, device)?)),
        };
        Ok(Self { weight, bias, eps: eps as f32, stored: kind != NormKind::Layer { affine: false } })
    }

    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    pub(crate) fn is_stored(&self) -> bool {
        self.stored
    }

    /// hidden + update, [rows, width] each, and the norm of that, where the device has a kernel for both at once.
    pub(crate) fn after_sum(&self, hidden: &Tensor, update: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        #[cfg(feature = "cuda")]
        if hidden.device().is_cuda() && self.bias.is_none() {
            return crate::cuda::add_rms_norm(hidden, update, &self.weight, self.eps).map(Some);
        }
        let _ = (hidden, update);
        Ok(None)
    }

    /// x [.., width] -> the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        Ok(match &self.bias {
            Some(bias) => ops::layer_norm(&x, &self.weight, bias, self.eps)?,
            None if x.device().is_cpu() && x.dtype() == DType::F32 => crate::kernels::elementwise::rms_norm(&x, &self.weight, self.eps)?,
            None => ops::rms_norm(&x, &self.weight, self.eps)?,
        })
    }
}
