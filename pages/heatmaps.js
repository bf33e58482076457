const parts = ["photo", "caption so far", "first token"];  // what `shares` are of; other is the prompt, or a class token
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const label = (text, control) => make("label", {}, text, control);

const kinds = {};  // of the methods, in the order of the methods
for (const [name, [kind]] of Object.entries(data.methods)) (kinds[kind] ??= []).push(make("option", {value: name}, name));
const method = make("select", {id: "method"},
  ...Object.entries(kinds).map(([kind, options]) => make("optgroup", {label: kind}, ...options)));
method.value = data.method;
const opacity = make("input", {id: "opacity", type: "range", min: 0, max: 100, value: 75});
const scale = make("select", {id: "scale"},
  make("option", {value: "shared"}, "one for the caption"), make("option", {value: "own"}, "own for each word"));
const truth = make("input", {id: "truth", type: "checkbox"});
const about = make("span", {class: "about"});
const bar = make("canvas", {width: 256, height: 1, role: "img", "aria-label": "colours from little to much attention"});
const strip = bar.getContext("2d");
data.colours.forEach((colour, i) => {
  strip.fillStyle = `rgb(${colour.join(" ")})`;
  strip.fillRect(i, 0, 1, 1);
});

// the map of one word over the photo, a pixel a patch; the browser smooths it
function paint(card) {
  const {photo, canvas, word} = card;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  card.outlines.forEach((outline, i) => {
    outline.hidden = !truth.checked || (word !== null && !photo.objects[i].words.includes(word));
  });
  card.buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === word));
  const every = photo.words.map(word => word.shares);
  const mean = every[0].map((parts, l) => parts.map((_, i) => every.reduce((sum, one) => sum + one[l][i], 0) / every.length));
  card.layers.replaceChildren(...(word === null ? bars(mean, "all words") : bars(every[word], photo.words[word].text)));
  if (word === null) {
    card.figures.textContent = "";
    return;
  }
  const count = canvas.width * canvas.height;
  const values = bytes(photo.maps[method.value]).subarray(word * count, (word + 1) * count);
  const most = scale.value === "own" ? Math.max(1, ...values) : 255;
  const picture = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    const level = Math.round(255 * value / most);
    const cover = Math.min(1, level / 255 + .15);  // what is low hides little of the photo
    picture.data.set([...data.colours[level], Math.round(2.55 * opacity.value * cover)], 4 * i);
  });
  context.putImageData(picture, 0, 0);
  const {text, probability, shares} = photo.words[word];
  const mass = shares.reduce((sum, layer) => sum + layer[0], 0) / shares.length;
  const named = photo.objects.filter(object => object.words.includes(word)).map(object => `, names ${object.name}`);
  card.figures.textContent =
    `${text}: probability ${probability.toFixed(2)}, ${Math.round(mass)}% of attention on the photo${named.join("")}`;
}

// where attention went: a bar for each layer, from the first on the left to the last on the right
function bars(shares, name) {
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const last = shares.length - 1;
  const told = parts.map((part, i) =>
    `${part} ${Math.round(shares[0][i])}% in the first layer, ${Math.round(shares[last][i])}% in the last`);
  const chart = svg("svg", {viewBox: `0 0 ${shares.length} 100`, preserveAspectRatio: "none", role: "img",
    "aria-label": `attention of ${name} by layer: ${told.join("; ")}`});
  shares.forEach((layer, x) => {
    let y = 100;
    layer.forEach((share, i) => {
      const height = Math.min(share, y);  // rounded shares may be more than 100 in all
      y -= height;
      chart.append(svg("rect", {class: `share${i}`, x: x + .06, y, width: .88, height}));
    });
  });
  const ends = ["layer 1", name, `layer ${shares.length}`].map(text => make("span", {}, text));
  return [chart, make("div", {class: "axis"}, ...ends)];
}

function card(photo) {
  const [rows, columns] = photo.grid;
  const [left, top, right, bottom] = photo.box.map((edge, i) => 100 * edge / photo.size[i % 2]);  // in percent
  const canvas = make("canvas", {width: columns, height: rows, "aria-hidden": "true"});
  const outlines = photo.objects.map(object => make("img", {class: "outline", src: object.outline, alt: "", hidden: ""}));
  const frame = make("div", {class: "frame"},
    make("img", {src: photo.photo, alt: photo.caption, width: photo.size[0], height: photo.size[1], decoding: "async"}),
    make("div", {class: "seen", style: `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%`}, canvas),
    ...outlines);
  const figures = make("p", {class: "figures", "aria-live": "polite"});
  const layers = make("div", {class: "layers"});
  const one = {photo, canvas, outlines, figures, layers, word: null, held: null, buttons: []};
  const show = word => { one.word = word; paint(one); };
  one.buttons = photo.words.map((word, i) => {
    const names = photo.objects.some(object => object.words.includes(i));
    const button = make("button", {type: "button", class: names ? "names" : "", "aria-pressed": "false",
      tabindex: i ? -1 : 0, "aria-label": `${word.text}, word ${i + 1} of ${photo.words.length}`}, word.text);
    button.addEventListener("mouseenter", () => show(i));
    button.addEventListener("focus", () => { one.held = i; show(i); });
    button.addEventListener("click", () => { one.held = i; show(i); });
    return button;
  });
  const words = make("p", {class: "words", role: "toolbar", "aria-label": "words of the caption; arrow keys go along"});
  one.buttons.forEach(button => words.append(button, " "));
  words.addEventListener("mouseleave", () => show(one.held));
  words.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (event.key === "Escape") {
      one.held = null;
      show(null);
    }
    if (!step) return;
    event.preventDefault();
    const next = (one.buttons.indexOf(document.activeElement) + step + one.buttons.length) % one.buttons.length;
    one.buttons.forEach((button, i) => { button.tabIndex = i === next ? 0 : -1; });
    one.buttons[next].focus();
  });
  one.element = make("article", {}, make("h2", {}, photo.stem, ...(photo.note ? [" ", make("strong", {}, photo.note)] : [])),
    frame, words, figures, layers);
  return one;
}

const cards = data.photos.map(card);
function refresh() {
  about.textContent = data.methods[method.value][1];
  cards.forEach(paint);
}
for (const control of [method, scale, truth]) control.addEventListener("change", refresh);
opacity.addEventListener("input", refresh);

const objects = data.photos.some(photo => photo.objects.length);
document.querySelector("main").append(
  make("p", {class: "about"}, "Point at a word, or go along with Tab and the arrow keys, to see where the model looked as "
    + "it wrote it. What is greyed the model never saw."),
  make("div", {class: "tools"}, label("method", method), label("scale", scale), label("opacity", opacity),
    ...(objects ? [label("objects", truth)] : []), make("span", {class: "scale"}, "little", bar, "much"), about),
  make("p", {class: "legend"}, "Where attention went, layer by layer, is below each caption: ",
    ...parts.map((part, i) => make("span", {class: "key"}, make("i", {class: `share${i}`}), part)),
    make("span", {class: "key"}, make("i", {class: "rest"}), "other")),
  make("div", {id: "photos"}, ...cards.map(one => one.element)));
refresh();
