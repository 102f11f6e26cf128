"""Heat maps of a page: a cell's text shows under the mouse, a finger, or the keyboard's focus.

Without scripts the texts are still there, as the browser's own tooltips.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from moa_search.pictures import cell_grid, hex_colours

__all__ = ["GRID_SCRIPT", "GRID_STYLE", "HOW_TO_READ", "grid_block"]

GRID_STYLE = """
figure { max-width: 40rem; }
figure.wide { max-width: none; }
.cells-place { min-width: calc(11px * var(--layers) + 26px); max-width: calc(28px * var(--layers) + 26px); }
@media (max-width: 40rem), (pointer: coarse) { .cells-place { min-width: calc(16px * var(--layers) + 26px); } }
.cells-place svg { max-height: none; }
svg.cells rect:hover, svg.cells rect:focus { stroke: var(--ink); stroke-width: 2.5; outline: none; }
svg.scale { max-width: 22rem; }
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.masks figure { margin: 0; }
.tip { position: fixed; z-index: 9; width: max-content; max-width: min(36rem, 92vw); padding: .35rem .6rem;
  border-radius: .3rem; background: var(--ink); color: var(--paper); font-size: .9rem;
  line-height: 1.35; pointer-events: none; }
@media print { .cells-place { min-width: 0; } .tip { display: none; } }
"""

GRID_SCRIPT = """
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("aria-hidden", "true");  // readers have the cell's own label
  tip.hidden = true;
  document.body.append(tip);
  let shown = null;
  const place = () => {
    if (!shown) return;
    const cell = shown.getBoundingClientRect(), width = document.documentElement.clientWidth;
    const left = cell.left + cell.width / 2 - tip.offsetWidth / 2;
    let above = shown.ownerSVGElement.getBoundingClientRect().top - tip.offsetHeight - 2;  // hides no other cell
    if (above < 0) above = cell.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(4, Math.min(left, width - tip.offsetWidth - 4)) + "px";
    tip.style.top = (above > 0 ? above : cell.bottom + 8) + "px";
  };
  const show = (cell) => {
    shown = cell;
    tip.hidden = !cell;
    if (cell) tip.textContent = cell.getAttribute("aria-label");
    place();
  };
  const cellOf = (event) => event.target.closest("rect[data-layer]");
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const grid of document.querySelectorAll("svg.cells")) {
    for (const title of grid.querySelectorAll("title")) title.remove();  // else the browser's would show beside ours
    const around = grid.parentElement;  // an svg that listens to focus would be a stop of its own
    let stop = grid.querySelector("rect[tabindex='0']");
    const focused = () => (grid.contains(document.activeElement) ? document.activeElement : null);
    around.addEventListener("pointerover", (event) => show(cellOf(event) || focused()));
    around.addEventListener("pointerleave", () => show(focused()));
    around.addEventListener("click", (event) => cellOf(event)?.focus());
    around.addEventListener("focusout", () => show(null));
    around.addEventListener("focusin", (event) => {
      stop.setAttribute("tabindex", "-1");
      stop = event.target;
      stop.setAttribute("tabindex", "0");
      show(stop);
    });
    around.addEventListener("keydown", (event) => {
      if (event.key === "Escape") show(null);
      const step = keys[event.key], { layer, head } = event.target.dataset;
      if (!step || layer === undefined) return;
      event.preventDefault();
      const [to, on] = [Number(layer) + step[0], Number(head) + step[1]];
      grid.querySelector(`rect[data-layer="${to}"][data-head="${on}"]`)?.focus();
    });
  }
  addEventListener("scroll", place, { capture: true, passive: true });
  addEventListener("resize", place, { passive: true });
})();
"""

HOW_TO_READ = (
    "Layers are across, KV heads down. Point at a cell for its exact numbers, or go there with Tab and walk with the "
    "arrow keys."
)


def grid_block(
    fills: Sequence[Sequence[str]],
    texts: Sequence[Sequence[str]],
    label: str,
    *,
    colours: str,
    scale: tuple[str, str, str],
    native: bool = False,
) -> str:
    """A heat map that can be walked with the arrow keys, with its scale of colours; wide ones scroll sideways.

    Args:
        fills: Colours ``[layer][kv_head]``.
        texts: What cells say, likewise.
        label: What the picture is.
        colours: The colour map that the colours are from.
        scale: What its first and last colour mean, and of what.
        native: Whether some cells are grey.
    """
    note = "; grey: the model's own window" if native else ""
    return (
        f'<figure class="wide"><div class="scroll"><div class="cells-place" style="--layers:{len(fills)}">\n'
        f"{cell_grid(fills, texts, label=label, focusable=True)}\n</div></div>\n"
        f"{_scale(colours, *scale)}\n"
        f"<figcaption>{escape(label)}{note}</figcaption>"
        "</figure>"
    )


def _scale(colours: str, first: str, last: str, of: str) -> str:
    """A bar of colours. Drawn, since browsers leave backgrounds out when they print."""
    steps = 32
    fills = hex_colours(np.linspace(0, 1, steps)[None], low=0, high=1, colours=colours)[0]
    bars = "".join(
        f'<rect x="{10 * index}" y="0" width="10.5" height="10" fill="{fill}"/>' for index, fill in enumerate(fills)
    )
    words = escape(f"{of}: {first} to {last}")
    return (
        f'<svg class="scale" role="img" aria-label="Scale of {words}" viewBox="0 0 {10 * steps} 24" '
        f'style="font:10px sans-serif;fill:currentColor">{bars}<text x="0" y="21">{escape(first)}</text>'
        f'<text x="{5 * steps}" y="21" text-anchor="middle">{escape(of)}</text>'
        f'<text x="{10 * steps}" y="21" text-anchor="end">{escape(last)}</text></svg>'
    )
