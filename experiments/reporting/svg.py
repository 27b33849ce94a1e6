"""A few lines of SVG: enough to draw a chart that follows the page's light or dark colors."""

import html
import math
from collections.abc import Sequence

# Mean width of one character of the 12 px system font, in px; used to reserve margins.
CHAR = 7.4


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick values that cover ``[low, high]``, steps of 1, 2, 2.5 or 5 times a power of 10.

    Args:
      low: the smallest value shown.
      high: the largest value shown; may equal ``low``.
      count: about how many intervals to make.

    Returns:
      Increasing values; the first is at most ``low``, the last at least ``high``.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Tick values for a log axis: 1, 2, 5 times powers of ten, over many decades only powers.

    Args:
      low: the smallest value shown, positive.
      high: the largest value shown.

    Returns:
      Increasing values that cover ``[low, high]``.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    mantissas = (1, 2, 5) if last - first <= 2 else (1,)
    values = [m * 10.0**k for k in range(first, last + 1) for m in mantissas]
    start = max((v for v in values if v <= low * (1 + 1e-9)), default=values[0])
    stop = min((v for v in values if v >= high * (1 - 1e-9)), default=values[-1])
    return [v for v in values if start <= v <= stop]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves labels apart along one axis until each is ``gap`` from the next.

    Args:
      wanted: the positions wished for, in px.
      gap: the smallest distance, in px.
      low: no label goes below this position, if they all fit.
      high: no label goes above this position, if they all fit.

    Returns:
      One position per label, in the order given.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


class Canvas:
    """A drawing of fixed size in px; colors come from CSS classes of the page."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> None:
        """A straight line of CSS class ``kind``."""
        self._parts.append(
            f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str, dash: str = "") -> None:
        """An open line through the points."""
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(f'<polyline class="{kind}" points="{shape}"{extra}/>')

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, tip: str = ""
    ) -> None:
        """A filled rectangle, with a tooltip."""
        self._parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" '
            f'height="{height:.1f}">{_tip(tip)}</rect>'
        )

    def mark(self, x: float, y: float, kind: str, shape: str = "circle", tip: str = "") -> None:
        """A marker of about 8 px: ``circle``, ``square``, ``diamond``, ``triangle`` or ``tick``."""
        if shape == "circle":
            body = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            self._parts.append(f"{body}{_tip(tip)}</circle>")
            return
        shapes: dict[str, list[tuple[float, float]]] = {
            "square": [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
            "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
            "triangle": [(0, -4.8), (4.6, 3.6), (-4.6, 3.6)],
            "tick": [(-7, -1), (7, -1), (7, 1), (-7, 1)],
        }
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[shape])
        self._parts.append(f'<polygon class="{kind}" points="{points}">{_tip(tip)}</polygon>')

    def text(
        self, x: float, y: float, value: str, anchor: str = "start", kind: str = "", turn: int = 0
    ) -> None:
        """Text with its baseline at ``(x, y)``, turned by ``turn`` degrees about that point."""
        rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{rotate}>'
            f"{html.escape(value)}</text>"
        )

    def render(self, label: str) -> str:
        """The ``<svg>`` element; ``label`` is what a screen reader says.

        On a narrow screen it shrinks to three quarters, where 12 px text is still legible, and
        scrolls below that.
        """
        return (
            f'<svg role="img" aria-label="{html.escape(label, quote=True)}" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" '
            f'height="{self.height:g}" style="min-width: {0.75 * self.width:.0f}px">'
            f"{''.join(self._parts)}</svg>"
        )


def _tip(value: str) -> str:
    return f"<title>{html.escape(value)}</title>" if value else ""
