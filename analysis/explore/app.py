# /// script
# [tool.marimo.display]
# theme = "system"
# [tool.marimo.runtime]
# output_max_bytes = 20000000
# ///
"""The page itself: marimo's cells. Its server gets the page's file as EXPLORE_PAGE."""

import marimo

app = marimo.App(width="full", app_title="Experts", css_file="page.css", html_head_file="head.html")


@app.cell
def _():
    import os
    from pathlib import Path

    import marimo as mo
    import numpy as np
    import plotly.graph_objects as go

    from analysis.explore import comparison, curves, expert, figures, maps, pair, pieces
    from analysis.explore.page_file import open_page, open_side

    page = open_page(Path(os.environ["EXPLORE_PAGE"]))
    sides = [open_side(files) for files in page.sides]
    mo.Html(pieces.header(sides, notes=page.notes))
    return Path, comparison, curves, expert, figures, go, maps, mo, np, page, pair, pieces, sides


@app.cell
def _(maps, mo, sides):
    sources = list(dict.fromkeys(name for side in sides for name in maps.sources_of(side)))
    source = mo.ui.dropdown(
        sources, value=sources[0], label="tokens of the", allow_select_none=False
    )
    return (source,)


@app.cell
def _(maps, mo, sides, source):
    shown = [side for side in sides if source.value in maps.sources_of(side)]
    quantities = list(
        dict.fromkeys(name for side in shown for name in maps.quantities_of(side, source.value))
    )
    quantity = mo.ui.dropdown(
        quantities, value=quantities[0], label="map of", allow_select_none=False
    )
    steps = sorted({step for side in shown for step in maps.steps_of(side, source.value)})
    has_steps = len(steps) > 1
    slider = mo.ui.slider(
        steps=steps if has_steps else [0, 1], value=steps[-1] if has_steps else 0, label="step",
        show_value=True, full_width=True, disabled=not has_steps,
    )  # fmt: skip
    play = mo.ui.switch(label="play", disabled=not has_steps)
    return has_steps, play, quantity, shown, slider, steps


@app.cell
def _(has_steps, mo, pieces, play, quantity, slider, source):
    # apart from the map: an output that is drawn again would take the keyboard's focus away
    mo.Html(
        pieces.heading(
            "Layers and experts",
            "Click an expert, or choose one below. A cross: no token chose it.",
        )
        + f"<div class='ex ex-controls'>{source}{quantity}{play if has_steps else ''}</div>"
        + f"<div class='ex-steady'>{slider if has_steps else ''}</div>"
    )
    return


@app.cell
def _(mo, play):
    clock = mo.ui.refresh(default_interval="1s") if play.value else None
    return (clock,)


@app.cell
def _(clock, has_steps, slider, steps):
    # the clock's value ends in how often it has ticked, e.g. "1s (3)"
    ticks = clock.value.rpartition("(")[2].rstrip(")") if clock is not None and clock.value else ""
    place = steps.index(slider.value) + int(ticks or 0) if has_steps else 0
    step = steps[place % len(steps)] if steps else None
    return (step,)


@app.cell
def _(maps, mo, np, sides):
    def _busiest():
        for number, side in enumerate(sides):
            if side.index is not None:
                values_LE = maps.map_of(side, maps.TRACE, quantity=maps.LOAD, step=None)
                return number, 0, int(np.argmax(values_LE[0]))
        return 0, 0, 0

    clicked, set_clicked = mo.state(_busiest())
    return clicked, set_clicked


@app.cell
def _(clicked, mo, sides):
    _side, _layer, _expert = clicked()
    described = {
        f"{'AB'[n]} {side.title}": n for n, side in enumerate(sides) if side.index is not None
    }
    _names = {n: name for name, n in described.items()}
    which = layer = number = None
    if described:
        _side = _side if _side in _names else min(_names)
        _info = sides[_side].index.info
        which = mo.ui.dropdown(described, value=_names[_side], label="of", allow_select_none=False)
        layer = mo.ui.dropdown(
            {str(n): n for n in range(_info.num_layers)},
            value=str(min(_layer, _info.num_layers - 1)), label="layer", allow_select_none=False,
        )  # fmt: skip
        number = mo.ui.dropdown(
            {str(n): n for n in range(_info.num_experts)},
            value=str(min(_expert, _info.num_experts - 1)), label="expert",
            allow_select_none=False,
        )  # fmt: skip
    return layer, number, which


@app.cell
def _(maps, quantity, shown, source):
    scale = maps.scale_of(shown, source.value, quantity=quantity.value)
    return (scale,)


@app.cell
def _(
    figures, go, layer, maps, mo, number, quantity, scale, set_clicked, shown, sides, source, step,
    which,
):  # fmt: skip
    def _plot(side):
        at = sides.index(side)
        chosen = (layer.value, number.value) if which is not None and which.value == at else None
        values_LE = maps.map_of(side, source.value, quantity=quantity.value, step=step)
        name = f"{'AB'[at]}  {side.title}" if len(sides) > 1 else side.title

        def on_click(points):
            if points:
                set_clicked((at, int(points[0]["y"]), int(points[0]["x"])))

        figure = figures.map_figure(values_LE, scale, title=name, chosen=chosen)
        element = mo.ui.plotly(
            go.Figure(figure), config={"displayModeBar": False}, on_change=on_click
        )
        return element, values_LE, name, figure["layout"]["height"]

    drawn = [
        _plot(side) for side in shown if quantity.value in maps.quantities_of(side, source.value)
    ]
    plots = mo.ui.array([element for element, *_ in drawn])
    return drawn, plots


@app.cell
def _(clock, drawn, mo, pieces, plots, quantity, scale, step):
    def _map(n, values_LE, name, height):
        width = 90 + values_LE.shape[1] * (24 if values_LE.size <= 160 else 12)
        return (
            f"<div><div class='ex-map'><div style='min-height:{height}px;min-width:{width}px'>"
            f"{mo.as_html(plots[n]).text}</div></div>"
            + pieces.numbers_table(values_LE.tolist(), unit=scale.unit, name=name)
            + "</div>"
        )

    _maps = "".join(_map(n, *rest) for n, (_, *rest) in enumerate(drawn))
    _now = "of all tokens" if step is None else f"at step {step:,}"
    mo.Html(
        f"<p class='ex'><b class='ex-now'>{quantity.value}, {_now}</b>"
        f"<span hidden>{clock if clock is not None else ''}</span></p>"
        f"<div class='ex-grid'>{_maps}</div>"
    )
    return


@app.cell
def _(layer, mo, number, pieces, sides, which):
    _of = which if sum(side.index is not None for side in sides) > 1 else ""
    mo.Html(
        pieces.heading("One expert", "No trace: what an expert takes is not known.")
        if which is None
        else pieces.heading("One expert", "Of all tokens of the trace.")
        + f"<div class='ex ex-controls'>{layer}{number}{_of}</div>"
    )
    return


@app.cell
def _(expert, layer, mo, number, pieces, sides, which):
    def _panel():
        side = sides[which.value]
        found = expert.describe_expert(
            side.index,
            layer=min(layer.value, side.index.info.num_layers - 1),
            expert=min(number.value, side.index.info.num_experts - 1),
        )
        return pieces.expert_panel(found, side.index.vocabulary, title=side.title)

    mo.Html("" if which is None else _panel())
    return


@app.cell
def _(Path, comparison, mo, page, pair, pieces, shown, sides, source, step):
    _parts = [
        pieces.heading(
            "Evenness by layer",
            "Of what the map shows: standard deviation of the load over its mean (0 is even); "
            "diversity, the part of the experts that are effectively in use (1 is all); experts "
            "without a token.",
        ),
        comparison.evenness_table(
            [comparison.evenness(side, source.value, step=step) for side in shown]
        ),
    ]
    if len(sides) > 1:
        _parts.append(
            pieces.heading(
                "Agreement of choices",
                "Of a token\u2019s experts, the part that both models chose, over the same tokens; "
                "chance is what independent routers of the same loads give. Best renumbering: "
                "after experts of B are numbered to fit A best, fitted on half of the documents "
                "and judged on the other half.",
            )
        )
        _parts.append(
            pieces.note(page.pair_note)
            if page.pair is None
            else comparison.agreement_table(pair.agreement(pair.open_pair(Path(page.pair))))
        )
    mo.Html("".join(_parts))
    return


@app.cell
def _(curves, figures, go, mo, pieces, sides):
    _figures = [figures.curve_figure(panel) for panel in curves.curves_of(sides)]
    _drawn = [
        mo.ui.plotly(go.Figure(figure), config={"displayModeBar": False}) for figure in _figures
    ]
    _parts = "".join(
        f"<div style='min-height:{figure['layout']['height']}px'>{mo.as_html(element).text}</div>"
        for element, figure in zip(_drawn, _figures, strict=True)
    )
    mo.Html(
        pieces.heading("Over the steps", "From the training log.")
        + f"<div class='ex-grid'>{_parts}</div>"
        if _drawn
        else ""
    )
    return


if __name__ == "__main__":
    app.run()
