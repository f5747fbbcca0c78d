use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    let Value::Object(tokens) = json!({"bos_token": "<s>", "eos_token": "</s>"}) else { unreachable!() };
    ChatTemplate::new(Path::new("tokenizer_config.json"), source.to_owned(), tokens).unwrap()
}

fn conversation() -> Vec<Message> {
    vec![
        Message::new("system", "  Be brief. "),
        Message::new("user", "Hi <there> & \"you\""),
        Message::new("assistant", "<think>\nhm\n</think>\n\nHello."),
        Message::new("user", "Bye"),
    ]
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    let source = "{{ bos_token }}\n{% for message in messages %}\n    {% if message['role'] == 'user' %}\nU: {{ \
                  message['content'] }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nA:{% endif %}";
    let found = template(source).render(&conversation(), true, &Map::new()).unwrap();
    assert_eq!(found, "<s>\nU: Hi <there> & \"you\"\nU: Bye\nA:");
    let found = template(source).render(&conversation(), false, &Map::new()).unwrap();
    assert_eq!(found, "<s>\nU: Hi <there> & \"you\"\nU: Bye\n");
}

#[test]
fn python_methods_slices_namespaces_and_loop_controls() {
    let source = "{%- set ns = namespace(last=-1) %}\
        {%- for message in messages[::-1] %}\
        {%- set index = (messages|length - 1) - loop.index0 %}\
        {%- if message.role == 'user' and message.content is string and not message.content.startswith('B') %}\
        {%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}{{ ns.last }}|\
        {{- messages[2].content.split('</think>')[-1].lstrip('\\n') }}|\
        {{- messages[0].content.strip().upper() }}|\
        {{- messages[0]['content'] | trim }}|{{ messages[1:] | length }}";
    let found = template(source).render(&conversation(), true, &Map::new()).unwrap();
    assert_eq!(found, "1|Hello.|BE BRIEF.|Be brief.|3");
}

#[test]
fn tojson_is_pythons() {
    let tools = json!([{"z": "<é>", "a": [1, 2.5, null, true], "e": {}, "l": []}]);
    let mut extra = Map::new();
    extra.insert("tools".into(), tools);
    let found = template("{{ tools[0] | tojson }}").render(&[], false, &extra).unwrap();
    assert_eq!(found, r#"{"z": "<é>", "a": [1, 2.5, null, true], "e": {}, "l": []}"#);
    let found = template("{{ tools[0] | tojson(indent=2) }}").render(&[], false, &extra).unwrap();
    let expected = "{\n  \"z\": \"<é>\",\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"e\": {},\n  \
                    \"l\": []\n}";
    assert_eq!(found, expected);
}

/// A template is code of a stranger: it may neither run on nor ask for any amount of memory at once.
#[test]
fn templates_without_end_are_stopped() {
    let refusal = |source: &str| template(source).render(&[], false, &Map::new()).unwrap_err().to_string();
    let nested = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert!(refusal(nested).contains("fuel"), "{}", refusal(nested));
    let wide = refusal("{{ [1] | tojson(indent=1000000000000000) }}");
    assert!(wide.contains("indent is 1000000000000000, at most 64"), "{wide}");
}

#[test]
fn the_templates_own_refusal_is_the_message() {
    let source = "\n{{ raise_exception('Roles must alternate') }}";
    let error = template(source).render(&[], false, &Map::new()).unwrap_err().to_string();
    assert_eq!(error, "tokenizer_config.json: chat template: Roles must alternate (line 2)");
    let error = ChatTemplate::new(Path::new("c.jinja"), "a\n{% if %}".into(), Map::new()).unwrap_err();
    let error = error.to_string();
    assert!(error.starts_with("c.jinja: chat template:") && error.contains("line 2"), "{error}");
}

#[test]
fn folders_give_string_list_or_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tokenizer_config.json");
    assert!(ChatTemplate::from_dir(dir.path()).unwrap().is_none());
    let render = || {
        let template = ChatTemplate::from_dir(dir.path()).unwrap().unwrap();
        template.render(&[], false, &Map::new()).unwrap()
    };
    let write = |value: Value| std::fs::write(&config, value.to_string()).unwrap();
    write(
        json!({"bos_token": {"content": "<b>"}, "eos_token": null, "chat_template": "1{{ bos_token }}{{ eos_token }}"}),
    );
    assert_eq!(render(), "1<b>");
    write(json!({"chat_template": [{"name": "tool_use", "template": "2"}, {"name": "default", "template": "3"}]}));
    assert_eq!(render(), "3");
    std::fs::write(dir.path().join("chat_template.jinja"), "4").unwrap();
    assert_eq!(render(), "4");
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    write(json!({"chat_template": [{"name": "tool_use", "template": "2"}]}));
    let error = ChatTemplate::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("`chat_template`"), "{error}");
}
