//! JSON as Python's `json.dumps(..., ensure_ascii=False)` spells it, which models have seen in training.

use serde_json::Value;

/// One line with `, ` and `: `, or indented by `indent` spaces.
pub(super) fn python_json(value: &Value, indent: Option<usize>) -> String {
    let mut out = String::new();
    write(&mut out, value, indent, 0);
    out
}

fn write(out: &mut String, value: &Value, indent: Option<usize>, depth: usize) {
    match value {
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            write_items(out, ['[', ']'], items, indent, depth);
        }
        Value::Object(entries) => {
            let items = entries.iter().map(|(key, item)| (Some(key.as_str()), item));
            write_items(out, ['{', '}'], items, indent, depth);
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn write_items<'a>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl ExactSizeIterator<Item = (Option<&'a str>, &'a Value)>,
    indent: Option<usize>,
    depth: usize,
) {
    let empty = items.len() == 0;
    let new_line = |out: &mut String, depth: usize| {
        if let (Some(indent), false) = (indent, empty) {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for (i, (key, item)) in items.enumerate() {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        new_line(out, depth + 1);
        if let Some(key) = key {
            out.push_str(&Value::from(key).to_string());
            out.push_str(": ");
        }
        write(out, item, indent, depth + 1);
    }
    new_line(out, depth);
    out.push(close);
}
