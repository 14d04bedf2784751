"""Fields: what the request types of all protocols have in common.

A field that is known is checked. A field that is not known is accepted, because clients send more each year than any
server knows, but never in silence: the answer names it in the header `x-leadline-ignored`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

IGNORED_HEADER = "x-leadline-ignored"

# Fields that only matter to a provider's own accounting.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}

Positive = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Text = Annotated[str, Field(max_length=2**27)]


class Body(BaseModel):
    """A request body."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def ignored(self) -> dict[str, str]:
        """The header that names fields without effect, if there are any."""
        names = sorted(name for name in self.model_extra or {} if name not in _HARMLESS)
        # A name comes from outside, and a header that holds a line break is two headers.
        shown = ", ".join(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII) or "?" for name in names)
        return {IGNORED_HEADER: shown[:512]} if names else {}


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """As the client sent it: the order of its keys reaches the model."""
        return self.model_dump(exclude_unset=True)


class Sampled(Body):
    """Fields of sampling, in OpenAI's names, with the extensions of vLLM."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    n: int | None = None
