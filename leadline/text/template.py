"""Template: the prompt format as a Jinja template, for the tools around a checkpoint that only know templates.

DeepSeek publishes no template, only an encoder in Python. `chat_template.jinja` gives the same text, so that
`apply_chat_template` of transformers, and every server that calls it, works with a checkpoint as it is. What a template
cannot do:

- It cannot read JSON: arguments of tool calls must be objects. transformers and the servers around it pass them so.
- It makes text, in which a control token typed by a user counts as one. transformers' `sanitize_control_tokens` and
  `Prompt.ids` are the ways around that.
- Tasks, `extracted_url`, `wo_eos` and the developer role are for DeepSeek's own pipelines, and left out.
- A wrong conversation is noticed less often than by `render`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from leadline.text.chat import EFFORT, Release
from leadline.text.messages import known

_DEFAULT_RELEASE = 'release | default("{}")'


def chat_template(release: Release = "preview") -> str:
    """The template, with the modes of a release unless its variable `release` says otherwise."""
    source = resources.files("leadline.text").joinpath("chat_template.jinja").read_text(encoding="utf8")
    known(release, EFFORT, "release")
    return source.replace(_DEFAULT_RELEASE.format("preview"), _DEFAULT_RELEASE.format(release))


def with_chat_template(tokenizer_config: Mapping[str, Any], release: Release = "preview") -> dict[str, Any]:
    """Content of a `tokenizer_config.json` with the template in it, in place of any other."""
    return {**tokenizer_config, "chat_template": chat_template(release)}
