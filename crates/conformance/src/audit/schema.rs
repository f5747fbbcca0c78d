//! The keys of a kernel's configuration: what values they take and what they mean.

/// The values of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A whole number.
    Count,
    /// `n`, `n..m` or `any`.
    Range,
    /// `AxBxC` or `AxB`.
    Tile,
    /// `true` or `false`.
    Flag,
    /// An element type.
    Type,
    /// One of these.
    Word(&'static [&'static str]),
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// It arranges the work and can change a result only through the order of sums.
    pub(crate) arrangement: bool,
    /// What it says, for the documentation.
    pub(crate) meaning: &'static str,
}

/// A key that is part of what is computed.
const fn semantic(name: &'static str, kind: Kind, meaning: &'static str) -> Key {
    Key { name, kind, arrangement: false, meaning }
}

/// A key that only arranges the work.
const fn arrangement(name: &'static str, kind: Kind, meaning: &'static str) -> Key {
    Key { name, kind, arrangement: true, meaning }
}

use Kind::{Count, Flag, Range, Tile, Type, Word};

/// The key called `name`.
pub(crate) fn key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

const WEIGHTS: &[&str] = &["f16", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "int4_u4", "nf3", "trellis_grid"];
const EPILOGUES: &[&str] = &[
    "none",
    "bias",
    "gelu_tanh",
    "gelu_erf",
    "silu",
    "relu",
    "bias+gelu_tanh",
    "bias+gelu_erf",
    "bias+silu",
    "bias+relu",
    "residual",
    "scaled_residual",
    "normalize",
];

/// Every key, in alphabetical order.
#[rustfmt::skip]
pub(crate) const KEYS: &[Key] = &[
    arrangement("a_cache", Count, "elements of the input kept in shared memory"),
    semantic("acc", Type, "accumulator"),
    arrangement("access", Word(&["lane_row", "lane_shuffle"]), "how lanes share packed words"),
    semantic("accumulate", Word(&["ordered"]), "how the parts of a sum are joined"),
    semantic("act", Word(&["silu", "gelu_tanh", "gelu_erf"]), "activation of a gate"),
    semantic("antialias", Flag, "a wider filter when an image shrinks"),
    arrangement("assign", Word(&["contiguous"]), "which steps a worker owns"),
    semantic("b_transposed", Flag, "the second operand is `[N, K]`"),
    semantic("back", Type, "type after the way back"),
    arrangement("bench", Flag, "a micro-benchmark"),
    semantic("block", Count, "rows of a cache block"),
    semantic("blocks_per_word", Count, "blocks whose positions share a word"),
    semantic("broadcast", Word(&["a", "w", "scales"]), "operands that a batch may share"),
    semantic("buffers", Word(&["partials", "flags"]), "what is filled"),
    semantic("carry", Word(&["previous"]), "state between calls"),
    semantic("causal", Flag, "hide keys after the query"),
    semantic("channels", Count, "channels of an image"),
    semantic("check", Word(&["valid_codes", "scatter", "encode_decode", "involution", "rotate_then_unrotate", "top_k", "decay", "state_update"]), "the fact that a self-test proves"),
    semantic("codes", Count, "every code of the format"),
    arrangement("cols_per_group", Count, "outputs of a workgroup"),
    arrangement("cols_per_thread", Count, "outputs of a unit"),
    semantic("combine", Word(&["ordered"]), "expert outputs are summed in the order of slots"),
    semantic("convention", Word(&["mix_current"]), "which token a mix weights"),
    arrangement("copy", Word(&["async"]), "how tiles reach shared memory"),
    semantic("counts", Type, "type of counters"),
    semantic("d", Count, "head size"),
    semantic("d_max", Count, "largest head size"),
    arrangement("decode", Word(&["lut", "inline"]), "how codes become values"),
    arrangement("dequant", Word(&["overlapped"]), "when codes become values"),
    semantic("dump", Word(&["logits", "probs"]), "further outputs"),
    semantic("e", Count, "experts"),
    semantic("e_max", Count, "largest number of experts"),
    semantic("elem", Type, "element type"),
    semantic("encoding", Word(&["wide", "compact"]), "how the positions of 4:8 are stored"),
    semantic("epilogue", Word(EPILOGUES), "what follows the sum, before the one rounding"),
    semantic("factor", Count, "image sizes are multiples of it"),
    semantic("filter", Word(&["top_k", "top_p", "bilinear", "bicubic"]), "filter of a draw or of an image"),
    semantic("format", Word(WEIGHTS), "weight format"),
    semantic("from", Type, "source type"),
    semantic("gqa", Word(&["none", "ratio", "explicit", "group", "mqa"]), "query heads that share a key head: none, Hq / Hkv (given or derived), all"),
    semantic("group_sizes", Word(&["separate"]), "each matrix has its own group size"),
    arrangement("heads_share_kv", Flag, "the query heads of a key head share its tiles"),
    semantic("ids", Word(&["per_row"]), "a list of ids for each row"),
    arrangement("impl", Word(&["bitwise", "branchless", "lut", "magic", "scalar", "vector"]), "how codes become values"),
    semantic("inplace", Flag, "the output is the input"),
    semantic("input", Word(&["probs"]), "what is drawn from"),
    semantic("io", Type, "type of inputs and outputs"),
    semantic("k", Count, "experts of a token"),
    semantic("k_max", Count, "largest k"),
    arrangement("k_tile", Count, "inputs of a tile"),
    semantic("kind", Word(&["default", "yarn"]), "frequency scaling"),
    semantic("kv", Word(&["io", "f16", "fp8_e4m3", "int4", "fp4"]), "type of the cache; `io` is that of the queries"),
    arrangement("kv_tile", Count, "keys of a tile"),
    semantic("lambda", Word(&["head", "scalar"]), "shape of lambda"),
    arrangement("lanes", Tile, "units of a plane x channels of a unit"),
    semantic("layout", Word(&["flat", "kn", "kn4", "kn8", "kn16", "planar3", "nhwc", "nchw"]), "order of codes, weights or pixels"),
    semantic("load", Type, "type of a load sum"),
    semantic("m", Range, "rows"),
    semantic("m_max", Count, "largest number of rows"),
    arrangement("mapping", Word(&["lane_per_shard", "one_output_per_thread", "row_per_group", "subgroup_per_position", "token_per_group"]), "which unit computes what"),
    semantic("mask", Word(&["additive", "causal", "u32_matrix", "u64_bits"]), "which keys are hidden"),
    semantic("max_pixels", Count, "largest image"),
    semantic("meta", Word(&["column"]), "order of sparse positions"),
    arrangement("method", Word(&["cdf"]), "how a draw is made"),
    arrangement("mma", Tile, "shape of a matrix instruction"),
    semantic("mode", Word(&["sym_s8", "asym_s8", "sym_u8", "asym_u8", "decay_only"]), "sign and zero point, or the step of a recurrence"),
    semantic("n", Count, "channels of a block, or columns"),
    semantic("nm", Word(&["1:4", "2:4", "2:8", "4:8"]), "weights kept of a block"),
    semantic("norm", Word(&["none", "rms"]), "norm of the input or of the latent"),
    semantic("normalize", Flag, "divide by the root of n"),
    semantic("offset", Word(&["floor"]), "rounding of half a pixel"),
    semantic("op", Word(&["sum", "mean", "max", "min", "scatter", "all_gather", "normalize", "channel_swap", "grayscale", "u8_to_unit"]), "reduction, exchange or pixel function"),
    semantic("order", Word(&["kn", "ascending", "slot", "sorted", "token", "py_px_c"]), "order of outputs or of a sum"),
    semantic("out", Type, "type of the output where it is not `io`"),
    semantic("outputs", Word(&["q", "k", "v"]), "tensors written"),
    arrangement("packs_per_group", Count, "words of a workgroup"),
    arrangement("packs_per_thread", Count, "words of a unit"),
    semantic("pairing", Word(&["interleaved"]), "which channels form a pair"),
    semantic("parents", Type, "type of parent ids"),
    semantic("partials", Type, "type of the parts of a sum"),
    semantic("partition", Count, "keys of a part"),
    semantic("phase", Word(&["histogram", "exclusive_prefix", "scatter", "reduce"]), "the step of the operation"),
    arrangement("pool", Count, "words that lanes share"),
    semantic("post_scale", Word(&["row", "element"]), "factors after the transform"),
    arrangement("prefetch", Word(&["packed"]), "what is read ahead"),
    semantic("prefix", Word(&["full", "per_node_limit"]), "keys before a tree"),
    arrangement("q_tile", Count, "queries of a tile"),
    semantic("ragged", Word(&["token_offsets"]), "batches of different lengths"),
    arrangement("registers", Flag, "rows are kept in registers"),
    semantic("remainder", Word(&["error"]), "what does not fill a patch"),
    semantic("renorm", Flag, "weights sum to 1"),
    semantic("report", Word(&["max_error"]), "what a self-test returns"),
    semantic("residual", Flag, "a residual is added"),
    semantic("resize", Word(&["bilinear"]), "filter of the original"),
    semantic("result", Word(&["offsets", "assignments", "u32_matrix"]), "what is written"),
    semantic("rng", Word(&["philox"]), "generator"),
    arrangement("roles", Word(&["2load+2compute"]), "what each plane does"),
    semantic("root", Word(&["0xFFFFFFFF"]), "parent of a root"),
    semantic("rope", Word(&["none", "tail"]), "channels that are rotated"),
    semantic("rope_max", Count, "largest number of rotated channels"),
    semantic("rounding", Word(&["rne", "rtz"]), "to nearest even, or towards zero"),
    semantic("route", Word(&["given", "computed"]), "where expert ids come from"),
    arrangement("routed", Word(&["token"]), "order of the routed rows"),
    semantic("scale", Word(&["none", "attention_factor"]), "factor on the result"),
    arrangement("scale_cache", Flag, "group scales are kept in shared memory"),
    semantic("scaled", Flag, "with group scales"),
    semantic("score", Word(&["softmax", "sigmoid", "softmax_selected"]), "score function"),
    semantic("shared", Flag, "the shared expert's output is added"),
    semantic("shared_experts", Count, "experts of every token"),
    semantic("sign", Word(&["u4", "s4"]), "(q - zero) scale, or (q - 8 - zero) scale"),
    semantic("slot", Word(&["stable"]), "order within an expert"),
    semantic("softmax", Flag, "probabilities instead of scores"),
    semantic("split", Word(&["none", "k", "tokens", "c_kv+k_pe"]), "what is split: inputs, keys, or a latent row"),
    semantic("splits", Count, "parts of the keys"),
    semantic("stage", Word(&["single", "a_then_b", "repetition", "temperature"]), "the step of the operation"),
    arrangement("stages", Count, "tiles in flight"),
    semantic("state", Type, "type of a recurrent state"),
    semantic("steps", Range, "tokens of a call"),
    arrangement("subgroup_tile", Tile, "outputs of a plane x planes"),
    semantic("t_max", Count, "largest number of tree nodes"),
    semantic("t_min", Count, "fewest tokens"),
    semantic("table", Type, "type of the cos and sin table"),
    semantic("tail", Word(&["none", "k", "any"]), "sizes that are not multiples of a vector: refused, along K, anywhere"),
    semantic("target", Word(&["q", "k"]), "tensors rotated"),
    arrangement("threads", Count, "units of a workgroup"),
    semantic("tie", Word(&["lowest_index"]), "which of equal values wins"),
    arrangement("tile", Tile, "rows x outputs x inputs of a workgroup"),
    arrangement("tile_k", Count, "inputs of a tile"),
    arrangement("tile_n", Count, "outputs of a tile"),
    semantic("to", Type, "target type"),
    semantic("tokens", Count, "tokens"),
    arrangement("tokens_per_group", Count, "tokens of a workgroup"),
    arrangement("values_per_thread", Count, "values of a unit"),
    arrangement("vec", Count, "elements of a vector"),
    semantic("weights", Word(&["separate"]), "two matrices or one"),
    semantic("window", Word(&["left"]), "keys around the query that are visible"),
    semantic("words", Count, "packed words"),
    arrangement("words_per_thread", Count, "words of a unit"),
    arrangement("workers", Range, "workers of the work list"),
    arrangement("wstage", Word(&["tile", "subgroup8x8"]), "where decoded weights are kept"),
    semantic("zeros", Type, "type of zero points"),
];
