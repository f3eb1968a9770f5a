"""The figure: seconds of a round over the number of clients, with what was measured."""

from collections.abc import Callable

from fedprompt_mpi.files import File
from fedprompt_mpi.forecast.answer import GRID, Answer
from fedprompt_mpi.report.theme import MARKERS, MUTED, SERIES, save, style

NAME = "forecast"


def plot_forecast(answer: Answer, place: Callable[[str], File]) -> None:
    """Write forecast.png and forecast.svg; both axes are logarithmic, bands are 95 % intervals."""
    from matplotlib.figure import Figure

    asked = answer.question
    with style():
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        for number, (name, forecasts) in enumerate(answer.curves.items()):
            colour = SERIES[number % len(SERIES)]
            axes.plot(GRID, [one.round.seconds for one in forecasts], color=colour, label=name)
            low, high = zip(*(one.round.interval for one in forecasts), strict=True)
            axes.fill_between(GRID, low, high, color=colour, alpha=0.15, linewidth=0)
        for number, run in enumerate(run for run in answer.measured.runs if run.method in asked.methods):
            label = f"{run.method}, measured: {run.place.ranks} rank{'s' if run.place.ranks > 1 else ''}"
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([run.place.clients], [run.round], marker, color=MUTED, label=label)
        axes.set(xscale="log", yscale="log", xlabel="clients of a round", ylabel="seconds of a round")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        nodes = f"{asked.nodes:,} nodes of {asked.ranks_per_node} ranks, or as many as have clients"
        axes.set_title(f"{nodes}; {answer.network.name}")
        axes.legend()
        save(figure, NAME, place)
