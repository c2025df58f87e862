"""A flow as a picture: tokens across, layers up, and a line for each edge from the token that is
read to the one that is written at."""

from __future__ import annotations

import io
from dataclasses import dataclass

from steer.errors import TooLarge
from steer.inspection.flow.result import FlowNode, FlowResult
from steer.inspection.token_labels import fonts, place_label, token_label

MAX_COLUMNS, MAX_LAYERS = 40, 100
_INK, _FAINT, _LINE = "#1f2933", "#7b8794", "#d9e0e7"
_FOR, _AGAINST = "#15528f", "#b2182b"
_ACROSS, _UP = 1.05, 0.42
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 0.9, 0.85, 0.75


def flow_picture(result: FlowResult) -> FlowPicture:
    """The graph of `result`; columns are the positions that have nodes."""
    return FlowPicture(result)


@dataclass(frozen=True)
class FlowPicture:
    result: FlowResult

    def png(self) -> bytes:
        """Edges as wide as their shares are large, MLPs as squares; blue for the token, red
        against it. Each state has what it says first.

        Raises `TooLarge` for more tokens or layers than can be seen.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow import)
        from matplotlib.figure import Figure  # noqa: PLC0415

        result = self.result
        columns = sorted({node.position for node in result.nodes})
        layers = len(result.followed[0].layers)
        if len(columns) > MAX_COLUMNS or layers > MAX_LAYERS:
            raise TooLarge(
                f"a flow over {len(columns)} tokens and {layers} layers is not readable: read "
                f"fewer positions or edges, at most {MAX_COLUMNS} tokens, or ask for JSON",
                code="answer_too_large",
                param="/positions",
            )
        place = {position: n for n, position in enumerate(columns)}
        drawn = max(len(columns), 4) * _ACROSS, (layers + 1) * _UP
        width, height = drawn[0] + _LEFT + _RIGHT, drawn[1] + _TOP + _BOTTOM
        figure = Figure(figsize=(width, height), dpi=144, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes(
            (_LEFT / width, _BOTTOM / height, drawn[0] / width, drawn[1] / height)
        )
        axes.set_xlim(-0.5, max(len(columns), 4) - 0.5)
        axes.set_ylim(-1.5, layers - 0.5)
        strongest = max(abs(one.share) for one in result.edges) or 1.0
        for edge in sorted(result.edges, key=lambda one: abs(one.share)):
            axes.plot(
                (place[edge.reads], place[edge.position]),
                (edge.layer - 1, edge.layer),
                color=_FOR if edge.share > 0 else _AGAINST,
                lw=0.6 + 4.0 * abs(edge.share) / strongest,
                alpha=0.75,
                solid_capstyle="round",
                zorder=2,
            )
        for position in result.positions:
            axes.plot((place[position],) * 2, (-1, layers - 1), color=_LINE, lw=1.2, zorder=1)
        for node in result.nodes:
            if node.part != "mlp":
                _label(axes, place[node.position], node)
            elif node.share is not None:
                axes.scatter(
                    place[node.position] + 0.42,
                    node.layer,
                    s=60.0 * min(abs(node.share) / strongest, 1.5),
                    marker="s",
                    color=_FOR if node.share > 0 else _AGAINST,
                    alpha=0.75,
                    lw=0,
                )
        axes.set_xticks(range(len(columns)))
        axes.set_xticklabels(
            [place_label(result.tokens, position) for position in columns], fontsize=8, color=_INK
        )
        axes.set_yticks(range(-1, layers))
        axes.set_yticklabels(["embed", *map(str, range(layers))], fontsize=7.5, color=_INK)
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
            label.set_fontfamily(fonts())
        axes.tick_params(length=0, pad=4)
        axes.set_ylabel("after layer", fontsize=8.5, color=_FAINT)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for text, down, size, colour in (
            (_title(result), 0.32, 12, _INK),
            (_subtitle(result), 0.56, 8.5, _FAINT),
        ):
            figure.text(
                0.3 / width,
                1 - down / height,
                text,
                fontsize=size,
                color=colour,
                fontfamily=fonts(),
                parse_math=False,
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
        return buffer.getvalue()


def _label(axes, column: int, node: FlowNode) -> None:  # type: ignore[no-untyped-def]
    up = -1 if node.part == "embedding" else node.layer
    axes.text(
        column,
        up,
        token_label(node.says[0].token, most=11),
        ha="center",
        va="center",
        fontsize=6.5,
        color=_INK,
        fontfamily=fonts(),
        parse_math=False,
        zorder=3,
        bbox={"boxstyle": "round,pad=0.18", "fc": "#f7f9fc", "ec": _LINE, "lw": 0.6},
    )


def _title(result: FlowResult) -> str:
    said = [repr(one.token.token) for one in result.followed[:4]]
    return f"What flows into {', '.join(said)}{' …' if len(result.followed) > 4 else ''}"


def _subtitle(result: FlowResult) -> str:
    return (
        f"{result.model} · the {len(result.edges)} strongest edges, and MLPs as squares: blue for "
        "the token, red against"
    )
