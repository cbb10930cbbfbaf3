//! Tiles of dot products: `out[i][j] = sum_k a[i][k] * b[j][k]`, both operands with contiguous rows.
//!
//! The sum over k runs in eight lanes (lane = k mod 8), blocks of [`K_BLOCK`] after blocks, the lanes of a block added as a fixed tree,
//! what is left over from a multiple of eight last. AVX2 and the portable version differ in rounding (fused or not), never in order;
//! AVX-512 gives AVX2's bits: one register holds the eight lanes of two rows of `b`, and the lanes of sixteen results are added side by side.

/// Products after which the lanes are added into the total.
const K_BLOCK: usize = 1024;

/// Blocks of rows of `a` and of `b` are multiples of these: whole tiles for AVX2 (4 x 3 rows) and AVX-512 (6 x 8).
pub(crate) const ROW_MULTIPLE: usize = 12;
pub(crate) const COLUMN_MULTIPLE: usize = 24;

/// Rows that lie `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct RowMajor {
    pub data: *const f32,
    pub stride: usize,
}

impl RowMajor {
    /// # Safety
    /// Row `i` must lie inside the allocation.
    pub unsafe fn row(self, i: usize) -> *const f32 {
        // SAFETY: by the caller
        unsafe { self.data.add(i * self.stride) }
    }
}

/// Computes rows `0..m` of `a` against rows `0..n` of `b` and writes `out[i * out_stride + j]`.
///
/// # Safety
/// `a` and `b` must have `m` and `n` readable rows of `k` elements; `out` must be writable for `m` rows of `n` elements `out_stride` apart.
pub(crate) unsafe fn block(a: RowMajor, m: usize, b: RowMajor, n: usize, k: usize, out: *mut f32, out_stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        if n >= avx512::TILE_B && has_avx512() {
            // SAFETY: the features were just checked; pointers by the caller
            return unsafe { avx512::block(a, m, b, n, k, out, out_stride) };
        }
        // SAFETY: the features were just checked; pointers by the caller
        return unsafe { avx2::block(a, m, b, n, k, out, out_stride) };
    }
    // SAFETY: by the caller
    unsafe { portable::block(a, m, b, n, k, out, out_stride) };
}

/// Adds `weights[j] * rows[j][0..d]` to `out[0..d]`, j in order.
///
/// # Safety
/// `rows` must have `weights.len()` readable rows of `out.len()` elements.
pub(crate) unsafe fn weighted_sum(weights: &[f32], rows: RowMajor, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the features were just checked; pointers by the caller
        return unsafe { avx2::weighted_sum(weights, rows, out) };
    }
    for (j, w) in weights.iter().enumerate() {
        // SAFETY: by the caller
        let row = unsafe { std::slice::from_raw_parts(rows.row(j), out.len()) };
        for (o, v) in out.iter_mut().zip(row) {
            *o += w * v;
        }
    }
}

/// Lines of weights that are summed together at most: 6 x 4 accumulators, 4 + 1 operands in AVX-512's 32 registers.
const LINES: usize = 6;

/// Adds `sum_j weights[l * keys + j] * rows[j][0..d]` to `out[l][0..d]` for every line, over the keys `ranges[l]` of it, j in order: the bits of
/// [`weighted_sum`] a line, with the rows that lines have in common read once for several.
///
/// # Safety
/// `rows` must have `keys` readable rows of `d` elements, every range must lie within `keys`, and every line of `out` must be writable for `d`
/// elements that no other one shares.
pub(crate) unsafe fn weighted_sums(weights: &[f32], keys: usize, ranges: &[(usize, usize)], rows: RowMajor, out: &[*mut f32], d: usize) {
    let one = |line: usize, from: usize, to: usize| {
        // SAFETY: by the caller
        unsafe {
            let rows = RowMajor { data: rows.row(from), ..rows };
            weighted_sum(&weights[line * keys + from..line * keys + to], rows, std::slice::from_raw_parts_mut(out[line], d));
        }
    };
    #[cfg(target_arch = "x86_64")]
    if has_avx512() && d.is_multiple_of(16) {
        for (chunk, (of, out)) in ranges.chunks(LINES).zip(out.chunks(LINES)).enumerate() {
            let line = chunk * LINES;
            let (from, to) = of.iter().fold((0, usize::MAX), |(f, t), range| (f.max(range.0), t.min(range.1)));
            if from < to {
                of.iter().enumerate().for_each(|(l, range)| one(line + l, range.0, from));
                // SAFETY: the features were just checked; the range is common to all lines
                unsafe { avx512::weighted_sums(&weights[line * keys..], keys, from, to, rows, out, d) };
                of.iter().enumerate().for_each(|(l, range)| one(line + l, to, range.1));
            } else {
                of.iter().enumerate().for_each(|(l, range)| one(line + l, range.0, range.1));
            }
        }
        return;
    }
    ranges.iter().enumerate().for_each(|(line, range)| one(line, range.0, range.1));
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    has_avx2() && std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512dq")
}

mod portable {
    use super::{K_BLOCK, RowMajor};

    pub(super) unsafe fn block(a: RowMajor, m: usize, b: RowMajor, n: usize, k: usize, out: *mut f32, out_stride: usize) {
        for i in 0..m {
            for j in 0..n {
                // SAFETY: by the caller of `dot::block`
                unsafe {
                    let (x, y) = (std::slice::from_raw_parts(a.row(i), k), std::slice::from_raw_parts(b.row(j), k));
                    *out.add(i * out_stride + j) = dot(x, y);
                }
            }
        }
    }

    pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
        let mut total = 0.0;
        let whole = x.len() / 8 * 8;
        for start in (0..whole).step_by(K_BLOCK) {
            let end = whole.min(start + K_BLOCK);
            let mut lanes = [0f32; 8];
            for (p, q) in x[start..end].chunks_exact(8).zip(y[start..end].chunks_exact(8)) {
                for lane in 0..8 {
                    lanes[lane] += p[lane] * q[lane];
                }
            }
            let half: [f32; 4] = std::array::from_fn(|l| lanes[l] + lanes[l + 4]);
            total += (half[0] + half[2]) + (half[1] + half[3]);
        }
        for (p, q) in x[whole..].iter().zip(&y[whole..]) {
            total += p * q;
        }
        total
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{K_BLOCK, RowMajor};
    use std::arch::x86_64::*;

    /// Rows of `a` and of `b` in the large tile: 4 x 3 accumulators, 3 + 1 operands in 16 registers.
    const TILE_A: usize = 4;
    const TILE_B: usize = 3;

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn block(a: RowMajor, m: usize, b: RowMajor, n: usize, k: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: every tile stays within m rows of a and n rows of b
        unsafe {
            let mut j = 0;
            while j < n {
                let cols = TILE_B.min(n - j);
                let mut i = 0;
                while i < m {
                    let rows = TILE_A.min(m - i);
                    let (ai, bj) = (RowMajor { data: a.row(i), ..a }, RowMajor { data: b.row(j), ..b });
                    let to = out.add(i * out_stride + j);
                    match (rows, cols) {
                        (4, 3) => tile::<4, 3>(ai, bj, k, to, out_stride),
                        (4, 2) => tile::<4, 2>(ai, bj, k, to, out_stride),
                        (4, 1) => tile::<4, 1>(ai, bj, k, to, out_stride),
                        (3, 3) => tile::<3, 3>(ai, bj, k, to, out_stride),
                        (3, 2) => tile::<3, 2>(ai, bj, k, to, out_stride),
                        (3, 1) => tile::<3, 1>(ai, bj, k, to, out_stride),
                        (2, 3) => tile::<2, 3>(ai, bj, k, to, out_stride),
                        (2, 2) => tile::<2, 2>(ai, bj, k, to, out_stride),
                        (2, 1) => tile::<2, 1>(ai, bj, k, to, out_stride),
                        (1, 3) => tile::<1, 3>(ai, bj, k, to, out_stride),
                        (1, 2) => tile::<1, 2>(ai, bj, k, to, out_stride),
                        _ => tile::<1, 1>(ai, bj, k, to, out_stride),
                    }
                    i += rows;
                }
                j += cols;
            }
        }
    }

    #[allow(clippy::needless_range_loop)] // indices name the tile's registers
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const M: usize, const N: usize>(a: RowMajor, b: RowMajor, k: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: M rows of a, N rows of b, k elements each; out has room for M x N
        unsafe {
            let whole = k / 8 * 8;
            let mut totals = [[0f32; N]; M];
            let mut start = 0;
            while start < whole {
                let end = whole.min(start + K_BLOCK);
                let mut acc = [[_mm256_setzero_ps(); N]; M];
                let mut at = start;
                while at < end {
                    let mut bv = [_mm256_setzero_ps(); N];
                    for j in 0..N {
                        bv[j] = _mm256_loadu_ps(b.row(j).add(at));
                    }
                    for i in 0..M {
                        let av = _mm256_loadu_ps(a.row(i).add(at));
                        for j in 0..N {
                            acc[i][j] = _mm256_fmadd_ps(av, bv[j], acc[i][j]);
                        }
                    }
                    at += 8;
                }
                for i in 0..M {
                    for j in 0..N {
                        totals[i][j] += sum(acc[i][j]);
                    }
                }
                start = end;
            }
            for i in 0..M {
                for j in 0..N {
                    for tail in whole..k {
                        totals[i][j] += *a.row(i).add(tail) * *b.row(j).add(tail);
                    }
                    *out.add(i * out_stride + j) = totals[i][j];
                }
            }
        }
    }

    /// ((0+4) + (2+6)) + ((1+5) + (3+7)).
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn sum(v: __m256) -> f32 {
        let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let pairs = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)))
    }

    #[allow(clippy::needless_range_loop)] // the column goes into every row
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn weighted_sum(weights: &[f32], rows: RowMajor, out: &mut [f32]) {
        let d = out.len();
        let mut at = 0;
        // SAFETY: at + width <= d on every path
        unsafe {
            while at + 64 <= d {
                columns::<8>(weights, rows, out.as_mut_ptr(), at);
                at += 64;
            }
            while at + 32 <= d {
                columns::<4>(weights, rows, out.as_mut_ptr(), at);
                at += 32;
            }
            while at + 8 <= d {
                columns::<1>(weights, rows, out.as_mut_ptr(), at);
                at += 8;
            }
            for c in at..d {
                for (j, w) in weights.iter().enumerate() {
                    out[c] = w.mul_add(*rows.row(j).add(c), out[c]);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn columns<const V: usize>(weights: &[f32], rows: RowMajor, out: *mut f32, at: usize) {
        // SAFETY: 8 * V columns from `at` are inside every row and inside `out`
        unsafe {
            let mut acc = [_mm256_setzero_ps(); V];
            for (c, lane) in acc.iter_mut().enumerate() {
                *lane = _mm256_loadu_ps(out.add(at + 8 * c));
            }
            for (j, w) in weights.iter().enumerate() {
                let w = _mm256_set1_ps(*w);
                let row = rows.row(j).add(at);
                for (c, lane) in acc.iter_mut().enumerate() {
                    *lane = _mm256_fmadd_ps(w, _mm256_loadu_ps(row.add(8 * c)), *lane);
                }
            }
            for (c, lane) in acc.iter().enumerate() {
                _mm256_storeu_ps(out.add(at + 8 * c), *lane);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{K_BLOCK, LINES, RowMajor, avx2};
    use std::arch::x86_64::*;

    /// Rows of `a`, and pairs of rows of `b`, in a tile: 6 x 4 accumulators, 4 + 1 operands in 32 registers.
    const TILE_A: usize = 6;
    const PAIRS: usize = 4;
    pub(super) const TILE_B: usize = 2 * PAIRS;

    /// Whole tiles of columns here, the last few as AVX2 has them.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    pub(super) unsafe fn block(a: RowMajor, m: usize, b: RowMajor, n: usize, k: usize, out: *mut f32, out_stride: usize) {
        let whole = n / TILE_B * TILE_B;
        // SAFETY: every tile stays within m rows of a and n rows of b
        unsafe {
            for j in (0..whole).step_by(TILE_B) {
                for i in (0..m).step_by(TILE_A) {
                    let (ai, bj) = (RowMajor { data: a.row(i), ..a }, RowMajor { data: b.row(j), ..b });
                    let to = out.add(i * out_stride + j);
                    match m - i {
                        1 => tile::<1>(ai, bj, k, to, out_stride),
                        2 => tile::<2>(ai, bj, k, to, out_stride),
                        3 => tile::<3>(ai, bj, k, to, out_stride),
                        4 => tile::<4>(ai, bj, k, to, out_stride),
                        5 => tile::<5>(ai, bj, k, to, out_stride),
                        _ => tile::<TILE_A>(ai, bj, k, to, out_stride),
                    }
                }
            }
            if whole < n {
                avx2::block(a, m, RowMajor { data: b.row(whole), ..b }, n - whole, k, out.add(whole), out_stride);
            }
        }
    }

    /// `d` is a multiple of 16, `out` has at most [`LINES`].
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    pub(super) unsafe fn weighted_sums(weights: &[f32], stride: usize, from: usize, to: usize, rows: RowMajor, out: &[*mut f32], d: usize) {
        // SAFETY: as this function's
        unsafe {
            match out.len() {
                0 => {}
                1 => lines::<1>(weights, stride, from, to, rows, out, d),
                2 => lines::<2>(weights, stride, from, to, rows, out, d),
                3 => lines::<3>(weights, stride, from, to, rows, out, d),
                4 => lines::<4>(weights, stride, from, to, rows, out, d),
                5 => lines::<5>(weights, stride, from, to, rows, out, d),
                _ => lines::<LINES>(weights, stride, from, to, rows, out, d),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    unsafe fn lines<const L: usize>(weights: &[f32], stride: usize, from: usize, to: usize, rows: RowMajor, out: &[*mut f32], d: usize) {
        let out: [*mut f32; L] = std::array::from_fn(|l| out[l]);
        let mut at = 0;
        // SAFETY: at + width <= d on every path
        unsafe {
            while at + 64 <= d {
                columns::<L, 4>(weights, stride, from, to, rows, out, at);
                at += 64;
            }
            while at < d {
                columns::<L, 1>(weights, stride, from, to, rows, out, at);
                at += 16;
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    unsafe fn columns<const L: usize, const V: usize>(weights: &[f32], stride: usize, from: usize, to: usize, rows: RowMajor, out: [*mut f32; L], at: usize) {
        // SAFETY: 16 * V columns from `at` are inside every row and inside every line of `out`; `to` weights in each of the lines
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); V]; L];
            for (l, line) in acc.iter_mut().enumerate() {
                for (c, lane) in line.iter_mut().enumerate() {
                    *lane = _mm512_loadu_ps(out[l].add(at + 16 * c));
                }
            }
            for j in from..to {
                let row = rows.row(j).add(at);
                let mut values = [_mm512_setzero_ps(); V];
                for (c, value) in values.iter_mut().enumerate() {
                    *value = _mm512_loadu_ps(row.add(16 * c));
                }
                for (l, line) in acc.iter_mut().enumerate() {
                    let w = _mm512_set1_ps(*weights.get_unchecked(l * stride + j));
                    for (lane, value) in line.iter_mut().zip(&values) {
                        *lane = _mm512_fmadd_ps(w, *value, *lane);
                    }
                }
            }
            for (l, line) in acc.iter().enumerate() {
                for (c, lane) in line.iter().enumerate() {
                    _mm512_storeu_ps(out[l].add(at + 16 * c), *lane);
                }
            }
        }
    }

    #[allow(clippy::needless_range_loop)] // indices name the tile's registers
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    unsafe fn tile<const M: usize>(a: RowMajor, b: RowMajor, k: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: M rows of a, TILE_B rows of b, k elements each; out has room for all products
        unsafe {
            let whole = k / 8 * 8;
            let mut totals = [_mm256_setzero_ps(); M];
            let mut start = 0;
            while start < whole {
                let end = whole.min(start + K_BLOCK);
                let mut acc = [[_mm512_setzero_ps(); PAIRS]; M];
                let mut at = start;
                while at < end {
                    let mut bv = [_mm512_setzero_ps(); PAIRS];
                    for j in 0..PAIRS {
                        let low = _mm512_castps256_ps512(_mm256_loadu_ps(b.row(2 * j).add(at)));
                        bv[j] = _mm512_insertf32x8::<1>(low, _mm256_loadu_ps(b.row(2 * j + 1).add(at)));
                    }
                    for i in 0..M {
                        let av = _mm512_broadcast_f32x8(_mm256_loadu_ps(a.row(i).add(at)));
                        for j in 0..PAIRS {
                            acc[i][j] = _mm512_fmadd_ps(av, bv[j], acc[i][j]);
                        }
                    }
                    at += 8;
                }
                for i in (0..M).step_by(2) {
                    let next = (i + 1).min(M - 1);
                    let sums = sums(acc[i], acc[next]);
                    totals[i] = _mm256_add_ps(totals[i], _mm512_castps512_ps256(sums));
                    if next > i {
                        totals[next] = _mm256_add_ps(totals[next], _mm512_extractf32x8_ps::<1>(sums));
                    }
                }
                start = end;
            }
            for i in 0..M {
                let to = out.add(i * out_stride);
                _mm256_storeu_ps(to, totals[i]);
                for tail in whole..k {
                    (0..TILE_B).for_each(|j| *to.add(j) += *a.row(i).add(tail) * *b.row(j).add(tail));
                }
            }
        }
    }

    /// The sums of the eight lanes of two times eight rows, in the order of [`avx2::sum`]; a register holds two rows.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    fn sums(first: [__m512; PAIRS], second: [__m512; PAIRS]) -> __m512 {
        let (x, y) = (pairs(first), pairs(second));
        // in a quarter: rows r and r + 4 of the first, then of the second eight
        let quarters = _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(x, y), _mm512_shuffle_ps::<0b11_01_11_01>(x, y));
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), quarters)
    }

    /// Of eight rows, r and r + 4 in quarter r of the result: (0+4) + (2+6) and (1+5) + (3+7) of each.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    fn pairs([a, b, c, d]: [__m512; PAIRS]) -> __m512 {
        let (low, high) = (halves(a, b), halves(c, d));
        _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(low, high), _mm512_shuffle_ps::<0b11_10_11_10>(low, high))
    }

    /// Of four rows, a quarter of the result each: lanes 0+4, 1+5, 2+6, 3+7.
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    fn halves(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn random(n: usize, rng: &mut StdRng) -> Vec<f32> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn tiles_equal_plain_sums_and_do_not_depend_on_the_tile() {
        let mut rng = StdRng::seed_from_u64(1);
        for (m, n, k) in [(20, 27, 100), (12, 16, 1537), (1, 1, 1), (1, 7, 8), (5, 4, 31), (9, 10, 576), (4, 3, 2051), (13, 2, 1030)] {
            let (a, b) = (random(m * k, &mut rng), random(n * k, &mut rng));
            let rows = |v: &[f32], i: usize| RowMajor { data: v[i * k..].as_ptr(), stride: k };
            let mut out = vec![0.0; m * n];
            // SAFETY: sizes match the allocations above
            unsafe { block(rows(&a, 0), m, rows(&b, 0), n, k, out.as_mut_ptr(), n) };
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[j * k + x])).sum();
                    assert!((f64::from(out[i * n + j]) - exact).abs() < 1e-5 * (k as f64).sqrt() + 1e-6, "{m}x{n}x{k} at {i},{j}");
                    let mut alone = 0.0;
                    // SAFETY: one row of each
                    unsafe { block(rows(&a, i), 1, rows(&b, j), 1, k, &mut alone, 1) };
                    assert_eq!(alone.to_bits(), out[i * n + j].to_bits());
                    let plain = portable::dot(&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
                    assert!((plain - alone).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn lines_summed_together_have_the_bits_of_lines_alone() {
        let mut rng = StdRng::seed_from_u64(3);
        for (lines, keys, d) in [(1, 5, 16), (7, 40, 64), (13, 9, 80), (6, 3, 72), (12, 30, 128)] {
            let (w, v) = (random(lines * keys, &mut rng), random(keys * d, &mut rng));
            // as under a causal mask with a window: ranges that differ
            let ranges: Vec<(usize, usize)> = (0..lines).map(|l| ((l / 3).min(keys - 1), (keys + l).saturating_sub(lines).max(l / 3 + 1).min(keys))).collect();
            let rows = RowMajor { data: v.as_ptr(), stride: d };
            let mut out = vec![0.0; lines * d];
            let pointers: Vec<*mut f32> = (0..lines).map(|l| out[l * d..].as_mut_ptr()).collect();
            // SAFETY: sizes match the allocations above
            unsafe { weighted_sums(&w, keys, &ranges, rows, &pointers, d) };
            for (l, (from, to)) in ranges.into_iter().enumerate() {
                let mut alone = vec![0.0; d];
                // SAFETY: as above
                unsafe { weighted_sum(&w[l * keys + from..l * keys + to], RowMajor { data: rows.row(from), ..rows }, &mut alone) };
                assert_eq!(alone, out[l * d..(l + 1) * d], "{lines} {keys} {d} line {l}");
            }
        }
    }

    #[test]
    fn a_weighted_sum_equals_the_plain_loop() {
        let mut rng = StdRng::seed_from_u64(2);
        for (keys, d) in [(1, 1), (3, 8), (17, 72), (40, 128), (5, 13)] {
            let (w, v) = (random(keys, &mut rng), random(keys * d, &mut rng));
            let mut out = vec![0.0; d];
            // SAFETY: sizes match the allocations above
            unsafe { weighted_sum(&w, RowMajor { data: v.as_ptr(), stride: d }, &mut out) };
            for c in 0..d {
                let exact: f64 = (0..keys).map(|j| f64::from(w[j]) * f64::from(v[j * d + c])).sum();
                assert!((f64::from(out[c]) - exact).abs() < 1e-5);
            }
        }
    }
}
