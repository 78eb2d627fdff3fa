// Lines over time, in an SVG that is as wide as its place and grows with what is added.

const HEIGHT = 320;
const EDGE = { left: 46, right: 14, top: 30, bottom: 42 };
const LEAST_MM = 2; // half the height, at least: noise shall not look like motion
const FIRST_IMAGES = 20; // the width, at first

function make(parent, tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** Round numbers from `from` to `to`, some `count` of them: 1, 2 or 5 times a power of ten apart. */
export function ticks(from, to, count) {
  const rough = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let n = Math.ceil(from / step); n * step <= to + step * 1e-6; n += 1) found.push(Number((n * step).toPrecision(6)));
  return found;
}

/** `names` are pairs of a value's name in what is added, and of what people read. */
export class Plot {
  #svg;
  #names;
  #units;
  #points = [];
  #repetitionS = 1;
  #isDue = false;

  constructor(svg, names, unitAcross, unitUp) {
    this.#svg = svg;
    this.#names = names;
    this.#units = [unitAcross, unitUp];
    new ResizeObserver(() => this.#redraw()).observe(svg);
  }

  clear(repetitionS) {
    this.#points = [];
    this.#repetitionS = repetitionS;
    this.#redraw();
  }

  /** A point has its `image`'s number, the seconds `at_s` at which that came, and a value for each name. */
  add(point) {
    this.#points.push(point);
    this.#redraw();
  }

  /** Once per picture of the screen, however much has come. */
  #redraw() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      this.#draw();
    });
  }

  #draw() {
    const width = Math.max(240, this.#svg.clientWidth);
    const endS = Math.max(FIRST_IMAGES * this.#repetitionS, this.#points.at(-1)?.at_s ?? 0);
    const values = this.#points.flatMap((point) => this.#names.map(([name]) => Math.abs(point[name])));
    const most = values.reduce((a, b) => Math.max(a, b), LEAST_MM) * 1.08;
    const across = (s) => EDGE.left + (s / endS) * (width - EDGE.left - EDGE.right);
    const up = (value) => EDGE.top + ((most - value) / (2 * most)) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.#svg.replaceChildren();
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    for (const value of ticks(-most, most, 8)) {
      make(this.#svg, "line", { class: value ? "grid" : "zero", x1: EDGE.left, x2: width - EDGE.right, y1: up(value), y2: up(value) });
      make(this.#svg, "text", { x: EDGE.left - 8, y: up(value) + 4, "text-anchor": "end" }, String(value).replace("-", "−"));
    }
    for (const s of ticks(0, endS, width / 60)) {
      make(this.#svg, "text", { x: across(s), y: HEIGHT - EDGE.bottom + 18, "text-anchor": "middle" }, s);
    }
    make(this.#svg, "text", { x: 4, y: 14 }, this.#units[1]);
    make(this.#svg, "text", { x: width - EDGE.right, y: HEIGHT - 6, "text-anchor": "end" }, `${this.#units[0]} since the start`);
    this.#names.forEach(([name, label], index) => {
      const x = EDGE.left + index * 90;
      make(this.#svg, "line", { class: `series-${index}`, x1: x, x2: x + 22, y1: 10, y2: 10 });
      make(this.#svg, "text", { x: x + 28, y: 14 }, label);
      make(this.#svg, "path", { class: `series-${index}`, d: this.#path(name, across, up) });
    });
  }

  /** A line through neighbours; where images are missing it is broken. */
  #path(name, across, up) {
    let before = -Infinity;
    return this.#points.map((point) => {
      const begins = point.image > before + 2;
      before = point.image;
      const place = `${across(point.at_s).toFixed(1)} ${up(point[name]).toFixed(1)}`;
      return begins ? `M${place}h0` : `L${place}`;
    }).join("");
  }
}
