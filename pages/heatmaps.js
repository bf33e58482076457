const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const label = (text, control) => make("label", {}, text, control);

const method = make("select", {id: "method"}, ...Object.keys(data.about).map(name => make("option", {value: name}, name)));
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
  const {text, probability, mass} = photo.words[word];
  const named = photo.objects.filter(object => object.words.includes(word)).map(object => `, names ${object.name}`);
  card.figures.textContent =
    `${text}: probability ${probability.toFixed(2)}, ${Math.round(100 * mass)}% of attention on the photo${named.join("")}`;
}

function card(photo) {
  const [rows, columns] = photo.grid;
  const [left, top, width, height] = photo.box;
  const canvas = make("canvas", {width: columns, height: rows, "aria-hidden": "true"});
  const outlines = photo.objects.map(object => make("img", {class: "outline", src: object.outline, alt: "", hidden: ""}));
  const frame = make("div", {class: "frame"},
    make("img", {src: photo.photo, alt: photo.caption, width: photo.size[0], height: photo.size[1], decoding: "async"}),
    make("div", {class: "seen", style: `left:${left}%;top:${top}%;width:${width}%;height:${height}%`}, canvas),
    ...outlines);
  const figures = make("p", {class: "figures", "aria-live": "polite"});
  const one = {photo, canvas, outlines, figures, word: null, held: null, buttons: []};
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
    frame, words, figures);
  return one;
}

const cards = data.photos.map(card);
function refresh() {
  about.textContent = data.about[method.value];
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
  make("div", {id: "photos"}, ...cards.map(one => one.element)));
refresh();
