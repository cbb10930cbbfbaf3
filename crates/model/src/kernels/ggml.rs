//! The quantised block types of GGUF files, as ggml lays their bytes out (ggml-common.h): a weight is `scale * number - minimum`, where scale and minimum
//! belong to 16 or 32 weights.

use candle_core::quantized::GgmlDType;
use half::f16;

/// Weights of a block of the k-quants, and the most that any type has in a block.
const MOST: usize = 256;

/// A type of blocks, of which the products have a kernel. (Q8_0 has one of its own.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockType {
    /// 4 bits and a scale of 32 weights.
    Q4_0,
    /// 4 bits, a scale and a minimum of 32 weights.
    Q4_1,
    /// 5 bits and a scale of 32 weights.
    Q5_0,
    /// 5 bits, a scale and a minimum of 32 weights.
    Q5_1,
    /// 2 bits; 4-bit scales and minima of 16 weights.
    Q2K,
    /// 3 bits; 6-bit scales of 16 weights.
    Q3K,
    /// 4 bits; 6-bit scales and minima of 32 weights.
    Q4K,
    /// 5 bits; 6-bit scales and minima of 32 weights.
    Q5K,
    /// 6 bits; 8-bit scales of 16 weights.
    Q6K,
}

/// What a type's weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Bits of a number.
    pub bits: usize,
    /// What is taken away from a number: 0 of types that have minima.
    pub offset: i32,
    /// Weights of a part: 16 or 32.
    pub part: usize,
    /// Weights of a block, which share a 16-bit scale.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Whether there are minima, too.
    pub minima: bool,
}

/// A block, unpacked. A weight is `scale * part * (number - offset) - minimum * part minimum`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub scale: f16,
    /// Zero of the types without minima.
    pub minimum: f16,
    /// Unsigned, below 2^bits.
    pub numbers: [u8; MOST],
    /// Of every part its factor of the scale, …
    pub scales: [i8; MOST / 16],
    /// … and of the minimum.
    pub minima: [u8; MOST / 16],
}

impl BlockType {
    /// All of them.
    pub const ALL: [Self; 9] = [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q2K, Self::Q3K, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Candle's name of the type.
    pub fn ggml(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Its name as everybody writes it: `q4_k`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    pub(crate) fn layout(self) -> Layout {
        let (bits, offset, part, block, bytes, minima) = match self {
            Self::Q4_0 => (4, 8, 32, 32, 18, false),
            Self::Q4_1 => (4, 0, 32, 32, 20, true),
            Self::Q5_0 => (5, 16, 32, 32, 22, false),
            Self::Q5_1 => (5, 0, 32, 32, 24, true),
            Self::Q2K => (2, 0, 16, MOST, 84, true),
            Self::Q3K => (3, 4, 16, MOST, 110, false),
            Self::Q4K => (4, 0, 32, MOST, 144, true),
            Self::Q5K => (5, 0, 32, MOST, 176, true),
            Self::Q6K => (6, 32, 16, MOST, 210, false),
        };
        Layout { bits, offset, part, block, bytes, minima }
    }

    /// Unpacks the bytes of one block.
    pub(crate) fn unpack(self, bytes: &[u8]) -> Block {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut block = Block { scale: half(0), minimum: f16::ZERO, numbers: [0; MOST], scales: [1; MOST / 16], minima: [1; MOST / 16] };
        match self {
            Self::Q4_0 => nibbles(&bytes[2..], &mut block.numbers),
            Self::Q4_1 => {
                // (ggml adds this minimum)
                block.minimum = -half(2);
                nibbles(&bytes[4..], &mut block.numbers);
            }
            Self::Q5_0 => {
                nibbles(&bytes[6..], &mut block.numbers);
                fifth_bits(&bytes[2..6], &mut block.numbers);
            }
            Self::Q5_1 => {
                block.minimum = -half(2);
                nibbles(&bytes[8..], &mut block.numbers);
                fifth_bits(&bytes[4..8], &mut block.numbers);
            }
            Self::Q2K => {
                (block.scale, block.minimum) = (half(80), half(82));
                for (part, byte) in bytes[..16].iter().enumerate() {
                    (block.scales[part], block.minima[part]) = ((byte & 15) as i8, byte >> 4);
                }
                pairs(&bytes[16..80], &mut block.numbers);
            }
            Self::Q3K => {
                block.scale = half(108);
                block.scales = scales_of_q3(&bytes[96..108]);
                pairs(&bytes[32..96], &mut block.numbers);
                for (i, number) in block.numbers.iter_mut().enumerate() {
                    *number |= (bytes[i % 32] >> (i / 32) & 1) << 2;
                }
            }
            Self::Q4K | Self::Q5K => {
                block.minimum = half(2);
                for part in 0..8 {
                    let (scale, minimum) = six_bits(&bytes[4..16], part);
                    (block.scales[part], block.minima[part]) = (scale as i8, minimum);
                }
                let low = &bytes[if self == Self::Q4K { 16 } else { 48 }..];
                for (i, number) in block.numbers.iter_mut().enumerate() {
                    *number = low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
                    if self == Self::Q5K {
                        *number |= (bytes[16 + i % 32] >> (i / 32) & 1) << 4;
                    }
                }
            }
            Self::Q6K => {
                block.scale = half(208);
                for (part, byte) in bytes[192..208].iter().enumerate() {
                    block.scales[part] = byte.cast_signed();
                }
                for (i, number) in block.numbers.iter_mut().enumerate() {
                    let (side, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                    let low = bytes[side * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
                    *number = low | (bytes[128 + side * 32 + l] >> (2 * quarter) & 3) << 4;
                }
            }
        }
        block
    }
}

/// 32 numbers of four bits: the low ones of 16 bytes, then the high ones.
fn nibbles(bytes: &[u8], numbers: &mut [u8]) {
    for i in 0..32 {
        numbers[i] = bytes[i % 16] >> (i / 16 * 4) & 15;
    }
}

/// Adds bit 4 to 32 numbers.
fn fifth_bits(bytes: &[u8], numbers: &mut [u8]) {
    for i in 0..32 {
        numbers[i] |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// 256 numbers of two bits: of each half of the block its 32 bytes, from the lowest bits on.
fn pairs(bytes: &[u8], numbers: &mut [u8]) {
    for (i, number) in numbers.iter_mut().enumerate() {
        *number = bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    }
}

/// Scale and minimum of a part of Q4_K and Q5_K: 8 + 8 numbers of six bits in 12 bytes.
fn six_bits(bytes: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (bytes[part] & 63, bytes[part + 4] & 63)
    } else {
        ((bytes[part + 4] & 15) | (bytes[part - 4] >> 6 << 4), (bytes[part + 4] >> 4) | (bytes[part] >> 6 << 4))
    }
}

/// Q3_K's 16 scales of six bits, less 32: the low four bits in 8 bytes, the high two in four.
fn scales_of_q3(bytes: &[u8]) -> [i8; 16] {
    std::array::from_fn(|part| {
        let low = bytes[part % 8] >> (part / 8 * 4) & 15;
        let high = bytes[8 + part % 4] >> (part / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn blocks_unpack_to_the_numbers_that_candle_reads_in_them() {
        let values = Tensor::randn(0.1f32, 1.0, (6, 512), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        for of in BlockType::ALL {
            let quantised = QTensor::quantize(&values, of.ggml()).unwrap();
            let expected = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let Layout { offset, part, block: weights, bytes, .. } = of.layout();
            assert_eq!((weights, bytes), (of.ggml().block_size(), of.ggml().type_size()));
            let data = quantised.data().unwrap();
            for (bytes, expected) in data.chunks(bytes).zip(expected.chunks(weights)) {
                let block = of.unpack(bytes);
                for (i, expected) in expected.iter().enumerate() {
                    let scale = block.scale.to_f32() * f32::from(block.scales[i / part]);
                    let minimum = block.minimum.to_f32() * f32::from(block.minima[i / part]);
                    let found = scale * (i32::from(block.numbers[i]) - offset) as f32 - minimum;
                    assert!((found - expected).abs() <= 1e-6 * expected.abs().max(scale.abs()), "{of:?} {i}: {found} {expected}");
                }
            }
        }
    }
}
