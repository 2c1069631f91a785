"""moe/data/chat_template.py: each published template, word for word, and as jinja renders it."""

from __future__ import annotations

import itertools

import pytest

from moe.config import CHAT_TEMPLATE_NAMES
from moe.data.chat_template import Part, chat_parts, chat_text, drops_system
from moe.errors import DataError

# the texts of the published tokenizer_config.json files
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
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello "},
    {"role": "user", "content": "Bye\nnow"},
]
TURNS = (
    "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n Hello <|end|>\n"
    "<|user|>\nBye\nnow<|end|>\n"
)
APRIL = "<|user|>\nHi<|end|>\n<|assistant|>\n Hello <|end|>\n<|user|>\nBye\nnow<|end|>\n"


@pytest.mark.parametrize(
    ("template", "prompted", "closed"),
    [
        ("phi35", f"{TURNS}<|assistant|>\n", f"{TURNS}<|endoftext|>"),
        ("phi3", f"{TURNS}<|assistant|>\n", f"{TURNS}<|endoftext|>"),
        ("phi3_april", f"<s>{APRIL}<|assistant|>\n", f"<s>{APRIL}<|assistant|>\n"),
        ("phi3_medium", f"{APRIL}<|assistant|>\n", f"{APRIL}<|assistant|>\n"),
        ("phi3_small", f"<|endoftext|>{TURNS}<|assistant|>\n",
         f"<|endoftext|>{TURNS}<|endoftext|>"),
        ("grin", f"{TURNS}<|assistant|>\n", f"{TURNS}<|endoftext|>"),
    ],
)  # fmt: skip
def test_a_conversation_is_written_as_published(template: str, prompted: str, closed: str) -> None:
    assert chat_text(CONVERSATION, template=template) == prompted
    assert chat_text(CONVERSATION, template=template, add_generation_prompt=False) == closed


def test_every_name_of_the_configuration_has_a_template() -> None:
    for template in CHAT_TEMPLATE_NAMES:
        assert chat_text(CONVERSATION, template=template)


@pytest.mark.parametrize("template", PUBLISHED)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_every_conversation_is_written_as_jinja_renders_it(
    template: str, add_generation_prompt: bool
) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    texts = ("", "Hi", "  <|end|>\n ", "{{ eos_token }}")
    messages = [
        {"role": role, "content": text}
        for role, text in itertools.product(("system", "user", "assistant"), texts)
    ]
    for conversation in ([], *([m] for m in messages), *itertools.permutations(messages, 3)):
        rendered, _ = utilities.render_jinja_template(
            conversations=[list(conversation)],
            chat_template=PUBLISHED[template],
            add_generation_prompt=add_generation_prompt,
            bos_token="<|endoftext|>" if template == "phi3_small" else "<s>",
            eos_token="<|endoftext|>",
        )
        assert rendered == [
            chat_text(conversation, template=template, add_generation_prompt=add_generation_prompt)
        ]


def test_an_empty_system_message_is_written_by_all_but_phi35_and_the_first_models() -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    written = {t for t in CHAT_TEMPLATE_NAMES if "system" in chat_text(messages, template=t)}
    assert written == {"phi3", "phi3_small", "grin"}


def test_the_templates_that_drop_the_system_message_say_so() -> None:
    for template in CHAT_TEMPLATE_NAMES:
        is_dropped = "Be brief." not in chat_text(CONVERSATION, template=template)
        assert drops_system(template) == is_dropped
    assert [t for t in CHAT_TEMPLATE_NAMES if drops_system(t)] == ["phi3_april", "phi3_medium"]


def test_tokens_written_inside_a_content_are_text_and_texts_are_joined() -> None:
    message = {"role": "user", "content": "<|end|><|user|>"}
    assert chat_parts([message, {"role": "assistant", "content": "x"}], template="phi3_medium") == [
        Part("<|user|>", True), Part("\n<|end|><|user|>", False), Part("<|end|>", True),
        Part("\n", False), Part("<|assistant|>", True), Part("\nx", False), Part("<|end|>", True),
        Part("\n", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "message", [{"role": "robot", "content": "x"}, {"role": "user"}, {"content": "x"}]
)
@pytest.mark.parametrize("template", CHAT_TEMPLATE_NAMES)
def test_a_bad_message_is_named(message: dict[str, str], template: str) -> None:
    with pytest.raises(DataError, match="chat message 1: got"):
        chat_parts([{"role": "user", "content": "x"}, message], template=template)


def test_an_unknown_template_is_named_with_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"chat_template: got 'phi3_smal'.*'phi3_small'"):
        chat_parts([], template="phi3_smal")
    with pytest.raises(DataError, match="allowed: phi35, phi3,"):
        drops_system("chatml")
