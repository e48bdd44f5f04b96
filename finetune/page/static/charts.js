// Charts of one run, live, or of several runs on one axis. Dragging zooms; a double click shows all again.
const box = document.querySelector(".charts[data-runs]");
const names = JSON.parse(box.dataset.runs);
const logarithmic = document.getElementById("log-axis");

// A colour of the style sheet as rgb(), which a canvas understands.
function colour(name) {
  box.style.color = `var(${name})`;
  const computed = getComputedStyle(box).color;
  box.style.color = "";
  return computed;
}

const LINES = ["--mark", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6"];
const ORDER = ["Training loss", "Validation loss", "Forgetting", "Learning rate", "Speed", "Peak memory"];
const charts = new Map(); // title -> { figure, place, plot, shape, zoomed }

async function curvesOf(name) {
  const answer = await fetch(`/runs/${encodeURIComponent(name)}/curves`);
  return answer.ok ? answer.json() : [];
}

async function draw() {
  const runs = await Promise.all(names.map(curvesOf));
  const titles = new Set(runs.flat().map((curve) => curve.title));
  for (const title of titles) {
    const curves = runs.map((curves) => curves.find((curve) => curve.title === title));
    const { data, series, bands } = lines(curves);
    const shape = `${series.length} ${logarithmic.checked}`;
    const chart = charts.get(title) ?? figure(title);
    charts.set(title, chart);
    const first = curves.find(Boolean);
    const [last] = first.values.slice(-1);
    chart.figure.querySelector("figcaption").textContent = first.caption;
    chart.place.setAttribute("aria-label", `${title}: ${Number(last.toPrecision(4))} ${first.unit} at step ${first.steps.at(-1)}`);
    if (chart.shape === shape) {
      chart.plot.setData(data, !chart.zoomed);
      continue;
    }
    chart.plot?.destroy();
    chart.shape = shape;
    chart.zoomed = false;
    chart.plot = new uPlot(options(chart, first.unit, series, bands), data, chart.place);
  }
}

function figure(title) {
  const element = document.createElement("figure");
  element.style.order = ORDER.indexOf(title);
  const heading = Object.assign(document.createElement("h3"), { textContent: title });
  const place = document.createElement("div");
  place.setAttribute("role", "img");
  element.append(heading, place, document.createElement("figcaption"));
  box.append(element);
  new ResizeObserver(() => charts.get(title)?.plot?.setSize(size(place))).observe(place);
  return { figure: element, place };
}

const size = (place) => ({ width: Math.max(200, place.clientWidth), height: 240 });

// One table of all runs, with a column for each line.
function lines(curves) {
  const tables = [], series = [{ label: "Step" }], bands = [];
  curves.forEach((curve, number) => {
    if (!curve) return;
    const table = [curve.steps];
    const stroke = colour(LINES[number % LINES.length]);
    const add = (values, options) => {
      table.push(values);
      series.push({ points: { show: curve.steps.length < 3 }, spanGaps: true, value: (_, y) => y?.toPrecision(4) ?? "–", ...options });
    };
    if (curve.low && names.length === 1) {
      add(curve.high, { label: "High", stroke: "transparent" });
      add(curve.low, { label: "Low", stroke: "transparent" });
      bands.push({ series: [series.length - 2, series.length - 1], fill: stroke.replace(")", " / 0.2)").replaceAll(",", "") });
    }
    if (curve.faint && names.length === 1) add(curve.faint, { label: "Each step", stroke: colour("--faint"), width: 1, alpha: 0.6 });
    add(curve.values, { label: names.length > 1 ? names[number] : curve.faint ? "Smoothed" : curve.title, stroke, width: 2 });
    tables.push(table);
  });
  return { data: tables.length > 1 ? uPlot.join(tables) : tables[0], series, bands };
}

function options(chart, unit, series, bands) {
  const axis = { stroke: colour("--ink"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const y = { ...axis, size: 72, values: (_, ticks) => ticks.map((y) => String(Number(y.toPrecision(3)))), label: unit || undefined, labelSize: unit ? 20 : 0 };
  return {
    ...size(chart.place), series, bands,
    axes: [axis, y],
    scales: { x: { time: false }, y: logarithmic.checked ? { distr: 3 } : {} },
    hooks: {
      setScale: [(plot, key) => {
        if (key !== "x") return;
        const steps = plot.data[0];
        chart.zoomed = plot.scales.x.min > steps[0] || plot.scales.x.max < steps.at(-1);
      }],
    },
  };
}

let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  setTimeout(async () => {
    waiting = false;
    if (!document.hidden) await draw();
  }, 500);
}

document.body.addEventListener("htmx:sseMessage", (event) => event.detail.type === "curves" && soon());
document.addEventListener("visibilitychange", soon);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach((chart) => (chart.shape = ""));
  draw();
});
logarithmic.addEventListener("change", draw);
draw();
