//! Which modules are quantized.

use marlin_formats::{Format, Scheme};
use marlin_quantize::{Module, Override, Pattern, Plan, QuantizeError, Role, parse_scheme};

fn modules() -> Vec<Module> {
    let module = |name: &str| Module::new(name, 8, 64, 2);
    [
        "model.embed_tokens",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts.0.down_proj",
        "model.layers.1.mlp.experts.10.down_proj",
        "model.layers.1.mlp.shared_experts.up_proj",
        "model.layers.2.eh_proj",
        "model.layers.2.embed_tokens",
        "lm_head",
    ]
    .map(module)
    .to_vec()
}

fn plan() -> Plan {
    Plan::new(Scheme::with_default_group(Format::Int4S4))
}

/// The formats chosen, by module, `-` for none.
fn chosen(plan: &Plan) -> Vec<String> {
    let assignments = plan.resolve(&modules()).unwrap();
    let name = |scheme: Option<Scheme>| match scheme {
        Some(scheme) => format!("{}:{}", scheme.format, scheme.group_size),
        None => "-".to_owned(),
    };
    assignments.iter().map(|a| name(a.scheme())).collect()
}

#[test]
fn roles_come_from_names() {
    let roles: Vec<Role> = modules().iter().map(|module| module.role).collect();
    let (linear, other) = (Role::Linear, Role::Other);
    let expected = [Role::Embedding, linear, linear, Role::Router, linear, linear, linear, other, other, Role::LmHead];
    assert_eq!(roles, expected);
    assert_eq!(modules()[4].layer, Some(1));
    assert_eq!(modules()[7].layer, None);
}

#[test]
fn only_decoder_linears_by_default() {
    let q = "int4_s4:128";
    assert_eq!(chosen(&plan()), ["-", q, q, "-", q, q, q, "-", "-", "-"]);
}

#[test]
fn everything_can_be_overridden() {
    let mut plan = plan();
    plan.embeddings = Some(Scheme::with_default_group(Format::Int8));
    plan.lm_head = Some(parse_scheme("nf4:32").unwrap());
    plan.ignore = vec!["*.shared_experts.*".parse().unwrap()];
    plan.overrides = vec![
        "*down_proj=int3".parse().unwrap(),
        "*.experts.1*=fp8:64".parse().unwrap(),
        "model.layers.1.mlp.gate=int8".parse().unwrap(),
    ];
    let expected =
        ["int8:128", "int4_s4:128", "int4_s4:128", "int8:128", "int3:128", "fp8_e4m3:64", "-", "-", "-", "nf4:32"];
    assert_eq!(chosen(&plan), expected);
}

#[test]
fn patterns_match_whole_paths() {
    let matches = |pattern: &str, name| pattern.parse::<Pattern>().unwrap().matches(name);
    for (pattern, name, expected) in [
        ("lm_head", "lm_head", true),
        ("lm_head", "model.lm_head", false),
        ("*lm_head", "model.lm_head", true),
        ("a*b*c", "a1b2c", true),
        ("a*b*c", "abc", true),
        ("a*b*c", "acb", false),
        ("a*b", "ab2", false),
        ("*", "", true),
        ("*aa", "a", false),
        ("aa*aa", "aaa", false),
        ("a*ba*ba", "aba", false),
        ("*.0.*", "layers.0.x", true),
        ("*.0.*", "layers.10.x", false),
    ] {
        assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
    }
}

#[test]
fn unused_options_are_errors() {
    let refuses = |change: &dyn Fn(&mut Plan), expected: &str| {
        let mut plan = plan();
        change(&mut plan);
        let mut modules = modules();
        modules.retain(|module| !matches!(module.role, Role::LmHead | Role::Embedding));
        let error = plan.resolve(&modules).unwrap_err();
        assert!(matches!(error, QuantizeError::NothingMatched { .. }));
        assert!(error.to_string().contains(expected), "{error}");
    };
    let scheme = Some(Scheme::with_default_group(Format::Int8));
    refuses(&|plan| plan.lm_head = scheme, "lm_head");
    refuses(&|plan| plan.embeddings = scheme, "embeddings");
    refuses(&|plan| plan.ignore = vec!["*.nope".parse().unwrap()], "*.nope");
    // Wildcards do not reach routers.
    refuses(&|plan| plan.overrides = vec!["*.gate=int8".parse().unwrap()], "*.gate");
}

#[test]
fn syntax_errors_say_what_is_wrong() {
    let message = |text: &str| text.parse::<Override>().unwrap_err().to_string();
    assert!(message("*gate").contains("PATTERN=FORMAT"));
    assert!(message("=int4").contains("empty"));
    assert!(message("re:x=int4").contains('*'));
    assert!(message("x=int4:many").contains("many"));
    assert!(message("x=int4:12").contains("multiple of 8"));
    assert!(message("x=nvfp4:32").contains("16"));
    let unknown = message("x=int5");
    for format in Format::ALL {
        assert!(unknown.contains(format.name()), "{unknown}");
    }
    assert!(message("x=q4_k").contains("only imported"));
    assert!(message("x=affine4:64").contains("only imported"));
}
