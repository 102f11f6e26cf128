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
