//! Packed integer codes of other projects, unpacked or moved into the native K-major words.

use marlin_formats::pack::Layout;

/// The code at bit `start` of an LSB-first stream of 32-bit words.
fn stream_code(word: impl Fn(usize) -> u32, start: usize, bits: u32) -> u8 {
    let (at, offset) = (start / 32, (start % 32) as u32);
    let mut code = word(at) >> offset;
    if offset + bits > 32 {
        code |= word(at + 1) << (32 - offset);
    }
    (code & ((1 << bits) - 1)) as u8
}

/// The codes of rows of words, `[rows, words]`, each an LSB-first stream whose first `count` codes are kept:
/// `[rows, count]`. Needs `words * 32 >= count * bits` and `words > 0`.
pub(super) fn unpack_rows(words: &[u32], words_per_row: usize, bits: u32, count: usize) -> Vec<u8> {
    let mut codes = Vec::with_capacity(words.len() / words_per_row * count);
    for row in words.chunks_exact(words_per_row) {
        codes.extend((0..count).map(|i| stream_code(|w| row[w], i * bits as usize, bits)));
    }
    codes
}

/// As [`unpack_rows`] for words that hold `32 / bits` whole codes, the top bits unused.
pub(super) fn unpack_rows_whole(words: &[u32], words_per_row: usize, bits: u32, count: usize) -> Vec<u8> {
    let per_word = 32 / bits as usize;
    let mut codes = Vec::with_capacity(words.len() / words_per_row * count);
    for row in words.chunks_exact(words_per_row) {
        codes.extend(
            (0..count).map(|i| stream_code(|w| row[w], i / per_word * 32 + i % per_word * bits as usize, bits)),
        );
    }
    codes
}

/// The codes of columns of words, `[words, columns]`, each an LSB-first stream along the first axis whose first
/// `count` codes are kept: `[columns, count]`.
pub(super) fn unpack_columns(words: &[u32], columns: usize, bits: u32, count: usize) -> Vec<u8> {
    let mut codes = vec![0; columns * count];
    // 32 codes take `bits` whole words, so that the words of a block are read row after row for all columns.
    for block in (0..count).step_by(32) {
        for n in 0..columns {
            let word = |w: usize| words[(block / 32 * bits as usize + w) * columns + n];
            let codes = &mut codes[n * count + block..(n * count + block + 32).min(n * count + count)];
            for (i, code) in codes.iter_mut().enumerate() {
                *code = stream_code(word, i * bits as usize, bits);
            }
        }
    }
    codes
}

/// The codes of a planar row: 32 codes take `bits` words, the low plane first, planes of 4, 2 and 1 bits as `bits`
/// needs them, each an LSB-first stream of whole words (GPTQModel's `gptq_p`).
pub(super) fn planar_code(word: impl Fn(usize) -> u32, i: usize, bits: u32) -> u8 {
    let (mut first, mut shift, mut code) = (i / 32 * bits as usize, 0, 0);
    for width in [4, 2, 1] {
        if bits & width != 0 {
            code |= stream_code(|w| word(first + w), i % 32 * width as usize, width) << shift;
            first += width as usize;
            shift += width;
        }
    }
    code
}

/// Rows of little-endian bytes `[n, bytes]`, each a stream of codes along K in the order of the native words, as
/// K-major words `[ceil(bytes / 4), n]`.
pub(super) fn transpose_bytes(rows: &[u8], n: usize) -> Vec<u32> {
    let row_bytes = rows.len() / n;
    let mut words = vec![0; row_bytes.div_ceil(4) * n];
    for (column, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (r, bytes) in row.chunks(4).enumerate() {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            words[r * n + column] = u32::from_le_bytes(word);
        }
    }
    words
}

/// `[rows, columns]` as `[columns, rows]`.
pub(super) fn transpose<T: Copy + Default>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    let mut turned = vec![T::default(); values.len()];
    for (r, row) in values.chunks_exact(columns).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            turned[c * rows + r] = value;
        }
    }
    turned
}

/// Codes `[n, k]` packed into native K-major words.
pub(super) fn pack_native(codes: &[u8], layout: Layout, n: usize, k: usize) -> Vec<u32> {
    let mut words = vec![0; layout.rows(k) * n];
    for (column, codes) in codes.chunks_exact(k).enumerate() {
        layout.store_column(codes, &mut words, n, column);
    }
    words
}

/// Codes `[n, k]` of native K-major words of `bits` = 2, 4 or 8.
pub(super) fn unpack_native(words: &[u32], bits: u32, n: usize, k: usize) -> Vec<u8> {
    let per_word = 32 / bits as usize;
    let mut codes = vec![0; n * k];
    for (r, row) in words.chunks_exact(n).enumerate() {
        for (column, &word) in row.iter().enumerate() {
            let start = (r * per_word).min(k);
            let end = (start + per_word).min(k);
            for (i, code) in codes[column * k + start..column * k + end].iter_mut().enumerate() {
                *code = (word >> (bits as usize * i)) as u8 & ((1u32 << bits) - 1) as u8;
            }
        }
    }
    codes
}
