//! The compiler's text.

const DEFINITION: &str = "\nstruct alignas(";
const END: &str = "\n};\n";

/// The text with the definitions of its vector types in alphabetical order. The compiler writes them in the order of a
/// hash map, which differs from run to run; none of them refers to another.
pub(super) fn in_order(text: &str) -> String {
    let Some(first) = text.find(DEFINITION) else { return text.to_owned() };
    let (before, mut rest) = text.split_at(first);
    let mut definitions = Vec::new();
    while rest.starts_with(DEFINITION) {
        let Some(end) = rest.find(END) else { break };
        let (definition, after) = rest.split_at(end + END.len());
        definitions.push(definition);
        rest = after;
    }
    definitions.sort_unstable();
    [before, &definitions.concat(), rest].concat()
}

/// Lines that declare an atomic as constant: Metal has no operation on it.
pub(super) fn const_atomics(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| {
        line.match_indices("atomic_").any(|(at, _)| {
            let declared = ["atomic_int", "atomic_uint", "atomic_long", "atomic_ulong", "atomic_float", "atomic_bool"];
            let Some(name) = declared.iter().find(|name| line[at..].starts_with(**name)) else { return false };
            let after = &line[at + name.len()..];
            let before = line[..at].rsplit([';', ',', '(', '<', '{']).next().unwrap_or_default();
            before.split_whitespace().any(|word| word == "const") || after.trim_start().starts_with("const")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_sorted() {
        let define = |name: &str| format!("\nstruct alignas(8) {name} {{\n    uint i_0;\n}};\n");
        let (a, b) = (define("float_2"), define("uint_2"));
        let text =
            |first: &str, second: &str| format!("#include <metal_stdlib>\n{first}{second}\nstruct info_st {{}};\n");
        assert_eq!(in_order(&text(&b, &a)), text(&a, &b));
        assert_eq!(in_order(&text(&a, &b)), text(&a, &b));
        assert_eq!(in_order("no definition"), "no definition");
    }

    #[test]
    fn only_constant_atomics() {
        let found = |line: &str| const_atomics(line).count();
        assert_eq!(found("const device atomic_uint* buffer_0 [[buffer(0)]],"), 1);
        assert_eq!(found("threadgroup atomic_float const* x = y;"), 1);
        assert_eq!(found("const device float* a, device atomic_uint* b"), 0);
        assert_eq!(found("const uint x = atomic_fetch_add_explicit(p, 1u, memory_order_relaxed);"), 0);
    }
}
