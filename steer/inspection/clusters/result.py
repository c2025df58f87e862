"""What clusters of states answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.clusters.tree import Linkage
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite
from steer.spec import Site


class ClusteredState(BaseModel):
    """A state by its prompt, counted from 0, and its position there; `cluster` is a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: int
    position: int
    cluster: int


class Exemplar(BaseModel):
    """A state near the middle of a cluster: its token, the text before it and that token included,
    and the cosine with the middle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: int
    position: int
    token: str
    text: str
    label: str | None = None
    similarity: Finite


class StateCluster(BaseModel):
    """`similarity` is the mean cosine of the cluster's states with its middle, `middles` those of
    its middle with every cluster's. `labels` are the counts of its states' labels, the commonest
    first; `purity` is the share of the commonest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    size: int
    similarity: Finite
    middles: tuple[Finite, ...]
    exemplars: tuple[Exemplar, ...]
    labels: dict[str, int] | None = None
    purity: Finite | None = None


class ClustersResult(BaseModel):
    """`clusters` from the largest, `states` in the order of the prompts.

    `silhouette` says how much nearer states lie to their own cluster than to the next, from -1 to
    1. `purity` is the share of labelled states that bear the commonest label of their cluster,
    `purity_by_chance` its mean over shuffled labels. `fingerprint` names the steering under which
    the states were read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.clusters"] = "inspect.clusters"
    model: str
    site: Site
    layer: int
    linkage: Linkage
    clusters: tuple[StateCluster, ...]
    states: tuple[ClusteredState, ...]
    silhouette: Finite | None = None
    purity: Finite | None = None
    purity_by_chance: Finite | None = None
    fingerprint: str | None = None


def clusters_heat_map(result: ClustersResult) -> HeatMap:
    """Clusters by labels, the share of each label in a cluster; without labels the cosines between
    the clusters' middles."""
    clusters = result.clusters
    every = sorted({label for one in clusters for label in one.labels or ()})
    if every:
        counts = [[(one.labels or {}).get(label, 0) for label in every] for one in clusters]
        values = [[count / max(sum(row), 1) for count in row] for row in counts]
        texts = [[str(count) if count else "" for count in row] for row in counts]
        columns, scale, column_label = every, "share of the cluster", "label"
    else:
        values = [list(one.middles) for one in clusters]
        texts = [[f"{value:+.2f}" for value in row] for row in values]
        columns = [str(one.number) for one in clusters]
        scale, column_label = "cosine of the middles", "cluster"
    subtitle = f"{result.model} · layer {result.layer}, {result.site}"
    if result.silhouette is not None:
        subtitle += f" · silhouette {result.silhouette:.2f}"
    if result.purity is not None:
        subtitle += f" · purity {result.purity:.2f}, {result.purity_by_chance:.2f} by chance"
    return HeatMap(
        title=f"{len(clusters)} clusters of {len(result.states)} states",
        subtitle=subtitle,
        row_label="cluster",
        column_label=column_label,
        rows=[f"{one.number} ({one.size})" for one in clusters],
        columns=columns,
        values=values,
        texts=texts,
        scale=scale,
        limits=(0.0, 1.0) if every else (-1.0, 1.0),
        diverging=not every,
    )
