"""What an audit found, in lines for people."""

from fedprompt_mpi.audit.record import AuditRecord, CanaryRecord, FigureRecord, Leak

NAMES = {"auc": "AUC", "recall": "recall", "precision": "precision", "tpr_at_0.01": "TPR at 1 % FPR",
         "tpr_at_0.001": "TPR at 0.1 % FPR"}  # fmt: skip
LABELS = {"recall": "labels right"}
"""Of the attack labels: what it names is as much as there is."""


def name_of(leak: Leak, figure: str) -> str:
    """Return what a figure is called."""
    return LABELS.get(figure, NAMES[figure]) if leak.attack == "labels" else NAMES[figure]


def words_of(figure: FigureRecord) -> str:
    """Return a share in %, its interval, and what a guess gets."""
    interval = (
        "" if figure.low is None or figure.high is None else f" ({100 * figure.low:.1f} to {100 * figure.high:.1f})"
    )
    chance = "" if figure.chance is None else f", chance {100 * figure.chance:.1f}"
    return f"{100 * figure.value:.1f} %{interval}{chance}"


def audit_lines(record: AuditRecord) -> list[str]:
    """Return the lines of an audit, one for each attack and view."""
    lines = [f"audit of round{'s' if len(record.rounds) > 1 else ''} {', '.join(map(str, record.rounds)) or 'none'}, "
             f"{record.seconds:.1f} s of attacks; intervals of 95 %"]  # fmt: skip
    for leak in record.leaks:
        figures = "; ".join(f"{name_of(leak, name)} {words_of(figure)}" for name, figure in leak.figures.items())
        lines.append(f"  {leak.view:<7} {leak.attack:<11} by {leak.by}: {figures}")
    if record.canary is not None:
        lines.append(f"  canary  {canary_words(record.canary)}")
    return lines


def canary_words(canary: CanaryRecord) -> str:
    """Return what canaries say of epsilon."""
    estimate = "none" if canary.estimate is None else f"{canary.estimate:.3g}"
    stated = "none" if canary.stated is None else f"{canary.stated:.4g}"
    return (
        f"epsilon of {canary.mechanism} is at least {canary.bound:.3g} (estimate {estimate}; {canary.inside} canaries "
        f"can show {canary.most:.3g}); stated {stated} at delta {canary.delta:g}"
    )
