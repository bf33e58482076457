const main = document.querySelector("main");
const COLOURS = ["#3567b7", "#d1741f", "#3c8f4a"];
const SVG = "http://www.w3.org/2000/svg";
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

function drawn(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const GROUNDING = [["match_at_1", "Match@1"], ["pair_win", "PairWin"], ["pointing", "pointing game"],
  ["auroc", "AUROC"]];

// round numbers from low to high, about five of them; whole ones where they count steps or layers
function ticks(low, high, least = 0) {
  const rough = Math.max(least, (high - low) / 5 || 1), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(part => part * power).find(
    part => part > 0.999 * rough && (!least || Number.isInteger(part)));
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({length: count}, (_, i) => (first + i) * step);
}
const short = value => value.toLocaleString("en", {maximumSignificantDigits: 3});

// lines over one x axis; a line of few points gets a mark on each
function curves(lines) {
  const [width, height, left, right, top, bottom] = [480, 200, 62, 12, 10, 28];
  const points = Object.values(lines).flat();
  const low = Math.min(0, ...points.map(point => point[1]));
  const high = Math.max(...points.map(point => point[1])) * 1.05 || 1;
  const first = Math.min(...points.map(point => point[0])), last = Math.max(...points.map(point => point[0]));
  const x = value => left + (width - left - right) * (value - first) / (last - first || 1);
  const y = value => height - bottom - (height - top - bottom) * (value - low) / (high - low);
  const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, role: "img"});
  for (const at of ticks(low, high))
    svg.append(drawn("line", {class: "axis", x1: left, x2: width - right, y1: y(at), y2: y(at)}),
      drawn("text", {x: left - 6, y: y(at) + 5, "text-anchor": "end"}, short(at)));
  for (const at of ticks(first, last, 1))
    svg.append(drawn("text", {x: x(at), y: height - 8, "text-anchor": "middle"}, short(at)));
  Object.values(lines).forEach((line, i) => {
    const path = line.map(point => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ");
    svg.append(drawn("polyline", {points: path, fill: "none", stroke: COLOURS[i], "stroke-width": 1.6}));
    if (line.length < 40) for (const point of line)
      svg.append(drawn("circle", {cx: x(point[0]), cy: y(point[1]), r: 2.6, fill: COLOURS[i]}));
  });
  const key = make("div", {class: "key"}, ...Object.keys(lines).map((name, i) =>
    make("span", {style: `color:${COLOURS[i]}`}, `— ${name}`)));
  return [svg, key];
}

const number = value =>
  value === null ? "none" : Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(3);
const signed = value => (value < 0 ? "" : "+") + value.toFixed(3);

const whole = (...parts) => parts.flatMap(part => [make("span", {class: "whole"}, part), " "]);  // no break inside one

// what stands in a cell: text, a number, a list, a score with its interval, or a difference with its interval and p
function cell(value) {
  if (Array.isArray(value)) return value.map(one => make("div", {}, ...cell(one)));
  if (typeof value === "number" || value === null) return [number(value)];
  if (typeof value !== "object") return [String(value)];
  if ("difference" in value)
    return whole(signed(value.difference), `[${signed(value.low)}, ${signed(value.high)}]`, `p ${value.p.toFixed(4)}`);
  if (value.score === null) return ["none"];
  const ends = value.interval ? [`[${value.interval.map(end => end.toFixed(3)).join(", ")}]`] : [];
  return whole(value.score.toFixed(3), ...ends);
}

function table({head, rows}) {
  const row = (cells, tag) => make("tr", {}, ...cells.map(value => make(tag, {}, ...cell(value))));
  return make("div", {class: "wide"},
    make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...rows.map(cells => row(cells, "td")))));
}

const breakable = name => name.replace(/_|(?<=[a-z])(?=[A-Z])/g, "$&\u200b");  // where a long name may be broken

const boxes = parts => make("div", {class: "boxes"}, ...parts.map(part =>
  make("div", {class: part.stages.length ? "box trained" : "box"}, make("b", {}, breakable(part.part)),
    make("span", {}, breakable(part.kind)), make("span", {}, part.shape),
    make("span", {}, `${part.parameters.toLocaleString("en")} parameters`),
    make("span", {}, part.stages.length ? `trained in ${part.stages.join(" and ")}` : "frozen"))));

// a tile for each word and method: the grey photo, the map over the part that the model sees
function maps(photo, methods) {
  const image = new Image();
  const tiles = [];
  const rows = methods.map(method => {
    const values = bytes(photo.maps[method]), count = photo.grid[0] * photo.grid[1];
    return make("div", {class: "method"}, make("b", {}, method), ...photo.words.map((word, i) => {
      const canvas = make("canvas", {width: 160, height: Math.round(160 * photo.size[1] / photo.size[0])});
      tiles.push([canvas, values.subarray(i * count, (i + 1) * count)]);
      return make("div", {class: "tile"}, canvas, word.text);
    }));
  });
  image.addEventListener("load", () => tiles.forEach(([canvas, values]) => paint(canvas, image, values, photo)));
  image.src = photo.photo;
  return [make("div", {}, photo.caption), ...rows];
}

// left, top, width and height, in percent, of what the model sees of a photo
function seen({box, size}) {
  const [left, top, right, bottom] = box.map((edge, i) => 100 * edge / size[i % 2]);
  return [left, top, right - left, bottom - top];
}

function paint(canvas, image, values, photo) {
  const [rows, columns] = photo.grid, [left, top, width, height] = seen(photo);
  const patches = make("canvas", {width: columns, height: rows}), small = patches.getContext("2d");
  const picture = small.createImageData(columns, rows);
  values.forEach((value, i) =>
    picture.data.set([...data.colours[value], Math.round(191 * Math.min(1, value / 255 + .15))], 4 * i));
  small.putImageData(picture, 0, 0);
  const context = canvas.getContext("2d"), part = [canvas.width / 100, canvas.height / 100];
  context.filter = "grayscale(1)";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  context.drawImage(patches, left * part[0], top * part[1], width * part[0], height * part[1]);
}

const explained = {  // by section or block
  "P1: captions without training": "Columns named published hold the figures of the course report: LLaVA-1.5-7B, and "
    + "CLIP ViT-L/14 with GPT-2 small, on the photos of a course, which are not public. The figures beside them are of "
    + "other photos, and on drawn scenes of other weights too. So they cannot be equal; what can be compared is which "
    + "one is higher.",
  "P3: where each word looked": "A tile for each word: the photo in grey, and on it the word's map, from dark "
    + "(nothing) to yellow (the highest hundredth of the caption's values). Negative values are shown as nothing. The "
    + "last method of each photo is the default. The course report guessed that attention between words may matter more "
    + "than attention to the photo: the curves below show where it goes.",
  diversity: "Self-CIDEr: CIDEr-D of a caption against the captions of the same photo by other seeds. At most 10; the "
    + "lower, the more diverse. The course report says that diversity is what costs CIDEr: compare with the scores "
    + "above.",
};

// how a block is shown, by the key that holds its content
const shown = {
  explain: one => [make("p", {}, explained[one.explain])],
  finding: one => [make("p", {class: "said"}, one.finding)],
  verbatim: one => [make("pre", {}, one.verbatim)],
  table: one => [table(one.table)],
  boxes: one => [boxes(one.boxes)],
  parameters: one => [table({head: ["part", "parameters", "align", "finetune"], rows: one.parameters.map(part =>
    [part.part, part.parameters, ...["align", "finetune"].map(stage =>
      part.stages.includes(stage) ? "trained" : "frozen")])})],
  grounding: one => [table({head: ["", ...GROUNDING.map(([, label]) => label)], rows: Object.entries(one.grounding).map(
    ([row, scores]) => [row, ...GROUNDING.map(([metric]) => scores[metric])])})],
  curves: one => curves(one.curves),
  attention: one => curves(Object.fromEntries(["photo", "caption so far", "first token"].map((part, n) =>
    [part, one.attention.map((layer, i) => [i + 1, layer[n]])]))),
  photo: one => [make("div", {class: "photo"}, make("img", {src: one.photo, alt: one.about}),
    make("dl", {}, ...one.lines.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)])))],
  maps: one => maps(one.maps, one.methods),
};

function block(one) {
  const kinds = Object.keys(shown).filter(key => key in one), parts = kinds.flatMap(key => shown[key](one));
  return make("figure", {class: kinds.join(" ")}, ...(one.about ? [make("figcaption", {}, one.about)] : []), ...parts,
    ...(one.by || []).map(output => make("p", {class: "by"},
      ...data.commands[output].split(" ").flatMap(word => [make("span", {}, word), " "]))));
}

const sections = Object.entries(data.sections);
main.append(make("nav", {}, ...sections.map(([title], i) => make("a", {href: `#part${i}`}, title))));
sections.forEach(([title, blocks], i) => main.append(make("h2", {id: `part${i}`}, title),
  ...(explained[title] ? [make("p", {}, explained[title])] : []), ...blocks.map(block)));
