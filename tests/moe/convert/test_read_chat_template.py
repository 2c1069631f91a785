"""moe/convert/read_chat_template.py: published texts are recognised, however they are spelled."""

from __future__ import annotations

import pytest

from moe.config import CHAT_TEMPLATE_NAMES
from moe.convert.chat_template_text import template_text
from moe.convert.read_chat_template import read_chat_template, recognise_chat_template

# as published; a newline inside a string is one in the JSON file's text too
PUBLISHED = {
    "phi35": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi3_april": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
        "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
        "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}"
        "{% endif %}{% endfor %}"
    ),
    "phi3_medium": (
        "{% for message in messages %}{% if (message['role'] == 'user') %}"
        "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
        "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}"
        "{% endif %}{% endfor %}"
    ),
    "phi3_small": (
        "{{ bos_token }}{% for message in messages %}"
        "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
VISION = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != "
    "'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("family", ["phi3", "phimoe", "phi3small"])
def test_a_published_text_is_recognised_in_every_family(name: str, family: str) -> None:
    found = recognise_chat_template({"chat_template": PUBLISHED[name]}, family=family)
    assert found == (name, None)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "respelled",
    [
        lambda text: text.replace("'", '"'),
        lambda text: text.replace("\n", "\\n"),
        lambda text: text.replace("message['role']", "message.role"),
        lambda text: text.replace("message['content']", 'message[ "content" ]'),
        lambda text: text.replace("' + '", "'  ~ '").replace("==", " == "),
        lambda text: text.replace("{%", "{%-").replace("%}", "-%}\n  "),
        lambda text: text.replace("%}", "%}\n").replace("{{", "{{-  "),
        lambda text: "{# the template #}\n" + text,
        lambda text: text.replace(
            "{{ eos_token }}", "{% generation %}{{eos_token}}{% endgeneration %}"
        ),
    ],
)
def test_another_spelling_of_the_same_is_recognised(name: str, respelled: object) -> None:
    text = respelled(PUBLISHED[name])  # type: ignore[operator]
    assert recognise_chat_template({"chat_template": text}, family="phimoe") == (name, None)
    assert rendered(text) == rendered(PUBLISHED[name])


def rendered(text: str) -> list[str]:
    """What transformers writes with this text."""
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": r, "content": f" {r} "} for r in ("system", "user", "assistant")]
    texts = []
    for add_generation_prompt in (True, False):
        texts += utilities.render_jinja_template(
            conversations=[messages],
            chat_template=text,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="<|endoftext|>",
        )[0]
    return texts


@pytest.mark.parametrize("name", CHAT_TEMPLATE_NAMES)
def test_what_we_write_is_recognised(name: str) -> None:
    text = template_text(name, bos_token="<|endoftext|>")
    assert read_chat_template({"chat_template": text}, family="phi3") == (
        "phi3" if name == "grin" else name  # their conversations are the same
    )


def test_the_order_of_the_roles_and_a_named_list_make_no_difference() -> None:
    text = PUBLISHED["phi3_medium"]
    swapped = (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{message['content'] + '<|end|>\n'}}{% elif message.role == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n'}}{% endif %}{% endfor %}"
    )
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": swapped}]
    for value in (text, swapped, named):
        assert read_chat_template({"chat_template": value}, family="phi3") == "phi3_medium"


@pytest.mark.parametrize(
    "changed",
    [
        PUBLISHED["phi35"].replace("<|user|>", "<|human|>"),
        PUBLISHED["phi35"].replace("{{ eos_token }}", "{{ bos_token }}"),
        PUBLISHED["phi35"].replace("{{ eos_token }}", ""),
        PUBLISHED["phi35"].replace("message['content'] + '<|end|>\n'", "message['content']"),
        PUBLISHED["phi35"].replace("'user'", "'tool'"),
        PUBLISHED["phi35"].replace("and message['content']", "and not message['content']"),
        PUBLISHED["phi35"].replace("message['role'] == 'user'", "message['role'] != 'user'"),
        PUBLISHED["phi35"].replace("<|user|>\n'", "<|user|>'"),
        PUBLISHED["phi35"].replace("{% endfor %}", "{% endfor %} "),
        PUBLISHED["phi35"] + "{{ more }}",
        "{{ bos_token }}" + PUBLISHED["phi35"],
        "{% set x = 1 %}" + PUBLISHED["phi35"],
        PUBLISHED["phi3_small"].replace("message['content']", "message['content'] | trim"),
        VISION,
        "{{ ''.__class__.__mro__ }}",
        "{% for message in messages %}" * 3,
        "{% endfor %}{% for message in messages %}",
        "<|im_start|>" * 10_000,
        "{{" * 10_000,
    ],
)
def test_another_template_gives_the_default_with_a_note(changed: str) -> None:
    found = recognise_chat_template({"chat_template": changed}, family="phimoe")
    assert found.name == "phi35"
    assert found.note is not None
    assert "not one of this family; phi35 is used" in found.note


@pytest.mark.parametrize(
    ("family", "name"), [("phi3", "phi3"), ("phimoe", "phi35"), ("phi3small", "phi3_small")]
)
@pytest.mark.parametrize("value", [None, "", 7, [], [{"name": "rag", "template": "x"}], ["x"], {}])
def test_a_missing_template_gives_the_default_of_the_family(
    family: str, name: str, value: object
) -> None:
    found = recognise_chat_template({"chat_template": value}, family=family)
    assert found.name == name
    assert "has no chat template" in str(found.note)
    assert recognise_chat_template({}, family=family) == found
