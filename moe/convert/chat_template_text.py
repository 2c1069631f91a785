"""The Jinja text in tokenizer_config.json for each name of CHAT_TEMPLATE_NAMES."""

from __future__ import annotations

from moe.data.chat_template import END_OF_TEXT

_LOOP, _END_LOOP = "{% for message in messages %}", "{% endif %}{% endfor %}"
_CLOSE = (
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_CONTENT = "message['content']"


def _turn(role: str, *, condition: str, keyword: str) -> str:
    return (
        f"{{% {keyword} message['role'] == '{role}'{condition} %}}"
        f"{{{{ '<|{role}|>\\n' + {_CONTENT} + '<|end|>\\n' }}}}"
    )


def _turns(*, system_condition: str) -> str:
    system = _turn("system", condition=system_condition, keyword="if")
    others = (_turn(role, condition="", keyword="elif") for role in ("user", "assistant"))
    return f"{_LOOP}{system}{''.join(others)}{_END_LOOP}{_CLOSE}"


_APRIL = (
    f"{_LOOP}{{% if message['role'] == 'user' %}}"
    f"{{{{ '<|user|>\\n' + {_CONTENT} + '<|end|>\\n<|assistant|>\\n' }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ {_CONTENT} + '<|end|>\\n' }}}}{_END_LOOP}"
)
TEXTS = {
    "phi35": _turns(system_condition=f" and {_CONTENT}"),
    "phi3": _turns(system_condition=""),
    "phi3_april": "{{ bos_token }}" + _APRIL,
    "phi3_medium": _APRIL,
    "phi3_small": (
        f"{{{{ bos_token }}}}{_LOOP}"
        f"{{{{ '<|' + message['role'] + '|>\\n' + {_CONTENT} + '<|end|>\\n' }}}}"
        f"{{% endfor %}}{_CLOSE}"
    ),
    "grin": _turns(system_condition=""),
}


def template_text(name: str, *, bos_token: str) -> str:
    """The text of a template for a tokenizer with this bos_token."""
    text = TEXTS[name]
    if name == "phi3_small" and bos_token != END_OF_TEXT:
        return text.replace("{{ bos_token }}", f"{{{{ '{END_OF_TEXT}' }}}}")
    return text
