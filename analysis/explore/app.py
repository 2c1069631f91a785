# /// script
# [tool.marimo.display]
# theme = "system"
# [tool.marimo.runtime]
# output_max_bytes = 20000000
# ///
"""The page itself: marimo's cells. Started by launch/explore.py, with -- --page FILE."""

import marimo

app = marimo.App(width="full", app_title="Experts", css_file="page.css", html_head_file="head.html")


@app.cell
def _():
    from pathlib import Path

    import marimo as mo
    import plotly.graph_objects as go

    from analysis.explore import maps, pieces
    from analysis.explore.curves import curves_of
    from analysis.explore.figures import curve_figure, map_figure
    from analysis.explore.page_file import open_page, open_side

    page = open_page(Path(str(mo.cli_args()["page"])))
    sides = [open_side(files) for files in page.sides]
    mo.Html(pieces.header(sides, notes=page.notes))
    return curve_figure, curves_of, go, map_figure, maps, mo, page, pieces, sides


@app.cell
def _(maps, mo, sides):
    sources = [s for side in sides for s in maps.sources_of(side)]
    source = mo.ui.dropdown(
        list(dict.fromkeys(sources)), value=sources[0], label="from", allow_select_none=False
    )
    return (source,)


@app.cell
def _(maps, mo, sides, source):
    shown = [side for side in sides if source.value in maps.sources_of(side)]
    quantities = list(dict.fromkeys(q for s in shown for q in maps.quantities_of(s, source.value)))
    quantity = mo.ui.dropdown(
        quantities, value=quantities[0], label="map of", allow_select_none=False
    )
    steps = sorted({step for side in shown for step in maps.steps_of(side, source.value)})
    slider = (
        mo.ui.slider(steps=steps, value=steps[-1], label="step", full_width=True)
        if len(steps) > 1
        else None
    )
    play = mo.ui.switch(label="play")
    return play, quantity, shown, slider, steps


@app.cell
def _(mo, play, slider):
    clock = mo.ui.refresh(default_interval="1s") if slider is not None and play.value else None
    return (clock,)


@app.cell
def _(clock, slider, steps):
    if slider is None:
        step = steps[0] if steps else None
    else:
        ticks = (
            int(str(clock.value).partition("(")[2].rstrip(")") or 0)
            if clock is not None and clock.value
            else 0
        )
        step = steps[(steps.index(slider.value) + ticks) % len(steps)]
    return (step,)


@app.cell
def _(maps, mo, shown):
    first = next((s.index or s.log for s in shown), None)
    get_clicked, set_clicked = mo.state((0, 0, 0))
    return get_clicked, set_clicked


@app.cell
def _(go, map_figure, maps, mo, quantity, set_clicked, shown, source, step):
    scale = maps.scale_of(shown, source.value, quantity=quantity.value)

    def _element(number, side):
        def clicked(points):
            print("clicked", points)
            if points:
                set_clicked((number, int(points[0]["y"]), int(points[0]["x"])))

        values = maps.map_of(side, source.value, quantity=quantity.value, step=step)
        figure = map_figure(values, scale, title=side.title, chosen=None)
        return mo.ui.plotly(go.Figure(figure), config={"displayModeBar": False}, on_change=clicked)

    plots = mo.ui.array([_element(n, side) for n, side in enumerate(shown)])
    return (plots,)


@app.cell
def _(mo, play, plots, quantity, slider, source, step, clock):
    mo.vstack(
        [
            mo.hstack(
                [source, quantity] + ([play] if slider is not None else []),
                justify="start",
                wrap=True,
            ),
            slider if slider is not None else mo.md(""),
            clock if clock is not None else mo.md(""),
            mo.hstack(list(plots), widths="equal", wrap=True),
        ]
    )
    return


@app.cell
def _(get_clicked, mo, plots):
    mo.md(f"{get_clicked()} {[p.value for p in plots]}")
    return


@app.cell
def _(curve_figure, curves_of, go, mo, sides, step):
    mo.hstack(
        [
            mo.ui.plotly(go.Figure(curve_figure(c, step=step)), config={"displayModeBar": False})
            for c in curves_of(sides)
        ],
        wrap=True,
    )
    return


if __name__ == "__main__":
    app.run()
