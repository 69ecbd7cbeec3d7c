"""Chat templates in Jinja that write a prompt as training has it; what transformers renders and other libraries read.

They are one line each: transformers drops line breaks and indentation around tags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<image>"
"""Where the image goes, in texts and in the templates' output."""

READ = (
    "{% set ns = namespace(messages=[], images=0) %}{% for message in messages %}"
    "{% set item = namespace(text='') %}"
    "{% if message['content'] is string %}{% set item.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{{% set item.text = item.text + '{MARK}' %}}"
    "{% elif part['type'] == 'text' %}{% set item.text = item.text + part['text'] %}"
    "{% else %}{{ raise_exception('The model reads text and images, no ' + part['type'] + '.') }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% set ns.messages = ns.messages + [dict(message, content=item.text)] %}"
    "{% if message['role'] == 'user' %}"
    f"{{% set ns.images = ns.images + item.text.split('{MARK}') | length - 1 %}}"
    "{% endif %}{% endfor %}"
    "{% if ns.images > 1 %}{{ raise_exception('The model reads one image in a conversation.') }}{% endif %}"
)
"""Puts the messages into ``ns.messages``, each content one string with ``<image>`` in it, and counts the images."""

STRAY_ROLE = (
    "{{ raise_exception('There is no place for a message of the role ' + message['role'] + ': the system text, if any, "
    "is that of training.') }}"
)


def written(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A special token as texts write it."""
    return str(tokenizer.convert_ids_to_tokens(token))


def say(text: str) -> str:
    """A tag that writes a text, whatever is in it."""
    return "{{ " + literal(text) + " }}" if text else ""


def literal(text: str) -> str:
    """A text as a string of Jinja."""
    for sign, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(sign, escaped)
    return f"'{text}'"
