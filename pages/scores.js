const several = data.runs.length > 1;
const number = value => value === null || value === undefined ? "n/a" : value.toFixed(3);

// one group of rows a photo: a row for each run's caption, then the references
const groups = data.photos.map((photo, order) => {
  const picture = photo.thumbnail
    ? [make("img", {src: photo.thumbnail, alt: "", loading: "lazy", decoding: "async"})] : [];
  const cell = make("td", {rowspan: data.runs.length + 1, class: "photo"}, ...picture, make("div", {}, photo.stem));
  const rows = photo.captions.map((caption, run) => make("tr", {},
    ...(run ? [] : [cell]),
    ...(several ? [make("td", {class: "run"}, data.runs[run])] : []),
    make("td", {class: "caption"}, caption || "(empty)"),
    ...photo.scores[run].map(score => make("td", {class: "number"}, number(score)))));
  const references = make("details", {},
    make("summary", {}, photo.references.length + (photo.references.length === 1 ? " reference" : " references")),
    ...photo.references.map(text => make("p", {}, text)));
  rows.push(make("tr", {}, make("td", {colspan: data.columns.length + 1 + several}, references)));
  return {body: make("tbody", {}, ...rows), order, photo,
    text: [photo.stem, ...photo.captions].join("\n").toLowerCase()};
});

const table = make("table");
const headers = [];
const by = make("select", {"aria-label": "run whose scores decide the order"},
  ...data.runs.map((run, index) => make("option", {value: index}, run)),
  ...data.runs.slice(1).map((run, index) =>
    make("option", {value: -1 - index}, `${run} less ${data.runs[0]}`)));
let sorted = {header: null, key: null, sign: -1};

// the score that decides: a run's, or how far a run is from the first
function decider(photo, metric) {
  const run = Number(by.value);
  if (run >= 0) return photo.scores[run][metric] ?? null;
  const [own, first] = [photo.scores[-run][metric], photo.scores[0][metric]];
  return own == null || first == null ? null : own - first;
}

function order() {
  const {header, key, sign} = sorted;
  if (!header) return;
  groups.sort((a, b) => {
    const [x, y] = [key(a.photo), key(b.photo)];
    if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;  // no score: last
    return sign * (x < y ? -1 : x > y ? 1 : 0) || a.order - b.order;
  });
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
  table.append(...groups.map(group => group.body));
}

function head(label, small, key, numeric) {
  const button = make("button", {type: "button"}, label);
  const header = make("th", {scope: "col", ...(numeric ? {class: "number"} : {})}, button,
    ...small.map(text => make("small", {}, text)));
  button.addEventListener("click", () => {
    sorted = {header, key, sign: sorted.header === header ? -sorted.sign : numeric ? -1 : 1};
    order();
  });
  headers.push(header);
  return header;
}

table.append(make("thead", {}, make("tr", {},
  head("photo", [], photo => photo.stem, false),
  ...(several ? [make("th", {scope: "col"}, "run", ...data.runs.map(run => make("small", {}, run)))] : []),
  make("th", {scope: "col"}, "caption"),
  ...data.columns.map((label, metric) => head(label, data.corpus.map(corpus => `${number(corpus[metric])} in all`),
    photo => decider(photo, metric), true)))), ...groups.map(group => group.body));
by.addEventListener("change", () => sorted.header ? order() : headers[1].querySelector("button").click());

const find = make("input", {id: "find", type: "search", placeholder: "words in captions or file names",
  "aria-label": "show only photos with these words in a caption or the file name"});
find.addEventListener("input", () => {
  const wanted = find.value.toLowerCase();
  for (const group of groups) group.body.hidden = !group.text.includes(wanted);
});

document.querySelector("main").append(
  make("p", {class: "about"}, `${data.photos.length} photos. Press a heading to sort.`),
  make("div", {class: "tools"}, find, ...(several ? [make("label", {}, "sorted by ", by)] : [])), table,
  make("dl", {}, ...data.columns.flatMap((label, metric) =>
    [make("dt", {}, label), make("dd", {}, data.meanings[metric])])));
