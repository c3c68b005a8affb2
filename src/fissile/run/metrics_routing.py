"""The part of metrics.json about routers: quality, redundancy, and what speed follows from.

Loads no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fissile.config import Strict

Model = Literal[
    "dense",
    "static",
    "random",
    "ridge",
    "pregate",
    "oracle",
    "all_experts",
    "pregate_dynamic",
    "per_layer",
    "per_layer_dynamic",
    "mean_gate",
    "spectral",
    "dynamic",
    "token",
    "readme",
    "cmoe",
    "expertweaver",
    "emoe",
    "oracle_layerwise",
    "oracle_per_layer",
    "static_uniform",
]


class Information(Strict):
    """What the choices of one layer tell about another's; see `refactor.redundancy.Redundancy`."""

    entropy_a: float = Field(description="of the earlier layer's choices, bits")
    entropy_b: float
    conditional: float = Field(description="of the later layer's given the earlier's, bits")
    information: float = Field(description="mutual information, plug-in estimate, bits")
    corrected: float = Field(description="the same with Miller-Madow entropies")
    shuffled: float = Field(description="the same between shuffled tokens: the size of the bias")
    adjusted: float = Field(description="share of what could lie above `shuffled` that does")
    normalised: float
    predictable: float = Field(description="tokens whose most likely choice is the right one")


class LayerPair(Information):
    """Two neighbouring layers that decide."""

    earlier: int
    later: int
    first: Information = Field(description="of the first of each token's experts alone")


class LayerChoices(Strict):
    """Choices of one layer, and how long they last from token to token."""

    layer: int
    sets: int = Field(description="distinct sets of experts")
    entropy: float = Field(description="of the sets, bits")
    most_common: float = Field(description="share of the tokens")
    imbalance: float = Field(description="largest expert load over the mean")
    switch_rate: float | None
    kept: float | None = Field(description="share of the last token's experts chosen again")
    chance: float = Field(description="pairs of tokens with the same set, wherever they stand")
    repeat_distance: float | None = Field(description="tokens since the same set, mean")
    new: float = Field(description="tokens whose set is new in their sequence")
    same: list[float | None] = Field(description="tokens with the set of 1, 2, 4, ... before")


class TransitionTable(Strict):
    """Probability of the later layer's common sets given the earlier's (Read-ME, figure 2a)."""

    earlier: int
    later: int
    rows: list[list[int]]
    columns: list[list[int]]
    share: list[float]
    probability: list[list[float]]


class Redundancy(Strict):
    """How much a router's choices repeat: between layers and from token to token."""

    tokens: int
    sequences: int
    num_experts: int
    top_k: float = Field(description="chosen per token, mean")
    layers: list[LayerChoices]
    pairs: list[LayerPair] = Field(default_factory=list)
    transitions: list[TransitionTable] = Field(default_factory=list)


class DomainMatrix(Strict):
    """Read-ME's experts one at a time: a row is an expert, a column the text of a domain."""

    share: float
    domains: list[str] = Field(description="of text, and whose masks made the experts")
    ppl: list[list[float | None]]

    def own_is_best(self) -> list[bool]:
        """For every domain whether the expert made from it has the lowest perplexity on it."""
        found = []
        for column in range(len(self.domains)):
            values = [row[column] for row in self.ppl]
            known = [value for value in values if value is not None]
            found.append(bool(known) and values[column] == min(known))
        return found


class RouterQuality(Strict):
    """One router against the oracle on the same experts and tokens; lists are per layer."""

    name: Model
    share: float
    recall_at_k: list[float] = Field(default_factory=list)
    exact: list[float] = Field(default_factory=list, description="tokens with the oracle's set")
    mass: list[float] = Field(default_factory=list, description="norm over the oracle's choices'")
    switch_rate: list[float | None] = Field(default_factory=list)
    entropy: list[float] = Field(default_factory=list, description="of the load over its maximum")
    imbalance: list[float] = Field(default_factory=list, description="largest load over the mean")


class Weights(Strict):
    """Weights of the dense model by what reads them, for the expected speed."""

    ffn: int
    attention: int
    query: int = Field(0, description="width of all queries; times the context, cost of scores")
    head: int = Field(description="output projection; a tied embedding counts here")
    embedding: int = Field(0, description="input embedding, read a row a token; 0 where tied")


class Division(Strict):
    """How an FFN is divided at one active share; means over layers."""

    wanted: float = Field(description="active share that the measurements are named by")
    share: float = Field(description="what whole experts make of it")
    shared: float = Field(description="share of neurons always computed")
    num_experts: int
    top_k: int
