// Shows the details of the token under the pointer, or of the one that was clicked; arrow keys go from token to token.
(() => {
  const data = (view) => view.mosData;

  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const percent = (value) => (value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`);
  const nats = (value) => (value === null ? "–" : value.toFixed(2));

  function swatch({ label, color }) {
    const element = make("span", { className: "mos-swatch" }, label);
    element.style.setProperty("--mos-component", color);
    return element;
  }

  function meter({ color }, value) {
    const fill = make("i");
    fill.style.width = `${100 * value}%`;
    const element = make("span", { className: "mos-meter" }, fill);
    element.style.setProperty("--mos-component", color);
    return element;
  }

  // The components that the details of a token show: all, or of many those with the largest shares of this token.
  function shownComponents({ components, others, most }, prediction) {
    const all = components.map((_, k) => k);
    const shares = prediction.responsibilities ?? prediction.mixture_weights;
    return others === null ? all : all.sort((j, k) => shares[k] - shares[j]).slice(0, most);
  }

  function row(name, cells) {
    return make("tr", {}, ...cells.map((cell) => (cell?.tagName?.startsWith("T") ? cell : make(name, {}, cell))));
  }
  const number = (text) => make("td", { className: "mos-number" }, text);

  function mixtureTable({ components, others }, prediction, shown) {
    const known = prediction.responsibilities !== null;
    const line = (mark, weight, responsibility, nll, entropy) => {
      const cells = [swatch(mark), make("td", {}, meter(mark, weight), percent(weight))];
      if (known) {
        cells.push(make("td", {}, meter(mark, responsibility), percent(responsibility)), number(nats(nll)));
      }
      return row("td", [...cells, number(nats(entropy))]);
    };
    const { mixture_weights, responsibilities, component_nll, component_entropies } = prediction;
    const rows = shown.map((k) =>
      line(components[k], mixture_weights[k], responsibilities?.[k], component_nll?.[k], component_entropies[k]));
    if (others !== null) {
      const sum = (shares) => shares.reduce((total, share, k) => (shown.includes(k) ? total : total + share), 0);
      rows.push(line(others, sum(mixture_weights), known && sum(responsibilities), null, null));
    }
    const titles = ["", "weight", ...(known ? ["responsibility", "nll"] : []), "entropy"];
    return make("table", {}, make("thead", {}, row("th", titles)), make("tbody", {}, ...rows));
  }

  function candidatesTable({ components }, prediction, shown, actual) {
    const columns = [["mixture", prediction.top], ["old softmax", prediction.softmax_top]];
    shown.forEach((k) => columns.push([swatch(components[k]), prediction.component_top[k]]));
    const rows = prediction.top.map((_, i) =>
      row("td", columns.map(([, top]) => {
        const candidate = top[i];
        const probability = make("small", {}, ` ${percent(candidate.probability)}`);
        const cell = make("td", { className: "mos-candidate" }, make("bdi", {}, candidate.text), probability);
        if (candidate.token_id === actual) cell.classList.add("mos-actual");
        return cell;
      })));
    const titles = row("th", columns.map(([title]) => title));
    return make("table", {}, make("thead", {}, titles), make("tbody", {}, ...rows));
  }

  function show(view, element) {
    const { components, tokens } = data(view);
    const detail = view.querySelector(".mos-detail");
    for (const shown of view.querySelectorAll(".mos-shown")) shown.classList.remove("mos-shown");
    element.classList.add("mos-shown");
    const { token_id, text, prediction } = tokens[element.dataset.index];
    const title = make("h3", {}, token_id === null ? "What comes next" : make("bdi", {}, text));
    if (token_id !== null) title.append(` token ${token_id}`);
    if (prediction === null) {
      detail.replaceChildren(title, make("p", {}, "Nothing stands before it that it could be predicted from."));
      return;
    }
    const children = [title];
    if (prediction.nll !== null) {
      const old = `, by the old softmax with ${percent(Math.exp(-prediction.softmax_nll))} (${nats(prediction.softmax_nll)} nats)`;
      children.push(make("p", {}, `predicted with ${percent(Math.exp(-prediction.nll))} (${nats(prediction.nll)} nats)${old}`));
    }
    const shown = shownComponents(data(view), prediction);
    children.push(make("div", { className: "mos-scroll" }, mixtureTable(data(view), prediction, shown)));
    const { mixture_weights_entropy, entropy, softmax_entropy } = prediction;
    const entropies = `of the mixture weights ${nats(mixture_weights_entropy)}, of the next token ${nats(entropy)}, by the old softmax ${nats(softmax_entropy)}`;
    children.push(make("p", { className: "mos-note" }, `Entropy in nats: ${entropies}.`));
    children.push(make("div", { className: "mos-scroll" }, candidatesTable(data(view), prediction, shown, token_id)));
    if (shown.length < components.length) {
      const rest = components.length - shown.length;
      const cut = `Of ${components.length} components the ${shown.length} with the largest shares of this token, not the other ${rest}; hf-mos inspect --json has all.`;
      children.push(make("p", { className: "mos-note" }, cut));
    }
    detail.replaceChildren(...children);
    markCut();
  }

  function leading(shares) {
    const k = shares.indexOf(Math.max(...shares));
    return [k, shares[k]];
  }

  // What a token is coloured by: the colour, how strong in percent, and the label.
  const scales = {
    responsibility: (p, components) => component(components, p.responsibilities ?? p.mixture_weights),
    weight: (p, components) => component(components, p.mixture_weights),
    surprise: (p) => (p.nll === null ? null : ["var(--mos-worse)", 75 * Math.min(p.nll / 10, 1), nats(p.nll)]),
    gain: (p) => {
      if (p.nll === null) return null;
      const gain = p.softmax_nll - p.nll;
      const label = `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)}`;
      return [gain < 0 ? "var(--mos-worse)" : "var(--mos-better)", 75 * Math.min(Math.abs(gain) / 2, 1), label];
    },
  };
  function component(components, shares) {
    const [k, share] = leading(shares);
    return [components[k].color, 15 + 45 * share, components[k].label];
  }

  function paint(view, scale) {
    const { components, tokens } = data(view);
    for (const element of view.querySelectorAll(".mos-token")) {
      const { prediction } = tokens[element.dataset.index];
      const [color, shade, label] = (prediction && scales[scale](prediction, components)) ?? ["", 0, ""];
      element.style.setProperty("--mos-component", color);
      element.style.setProperty("--mos-shade", `${shade}%`);
      element.dataset.label = label;
      // A number above a token may not reach over that of the next; the detail shows it.
      const ink = element.querySelector(".mos-ink");
      ink.dataset.label = label.length <= ink.textContent.trimEnd().length ? label : "";
    }
  }

  // Says of each table that is wider than its place that it goes on.
  function markCut() {
    for (const place of document.querySelectorAll(".mos-scroll")) {
      place.classList.toggle("mos-cut", place.scrollWidth > place.clientWidth + 1);
    }
  }
  window.addEventListener("resize", markCut);

  const viewOf = (target) => target?.closest?.(".mos-inspection");
  const tokenOf = (target) => target?.closest?.(".mos-token");

  document.addEventListener("pointerover", ({ target }) => {
    const token = tokenOf(target);
    if (token && !viewOf(token).mosPinned) show(viewOf(token), token);
  });
  document.addEventListener("click", ({ target }) => {
    const token = tokenOf(target);
    if (!token) return;
    const view = viewOf(token);
    view.mosPinned = view.mosPinned === token ? null : token;
    show(view, token);
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !event.target.matches?.(".mos-tokens")) return;
    const view = viewOf(event.target);
    const elements = [...view.querySelectorAll(".mos-token")];
    const shown = elements.indexOf(view.querySelector(".mos-shown"));
    const token = elements[Math.min(Math.max(shown + step, 0), elements.length - 1)];
    view.mosPinned = token;
    show(view, token);
    token.scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
  document.addEventListener("change", ({ target }) => {
    if (target.matches?.(".mos-scale")) paint(viewOf(target), target.value);
  });

  // A view that comes later, as in an app, opens as one that is there from the start. An app may put a new inspection
  // into the elements of the one before.
  function open() {
    for (const view of document.querySelectorAll(".mos-inspection")) {
      if (view.mosId === view.dataset.id) continue;
      view.mosId = view.dataset.id;
      view.mosData = JSON.parse(view.querySelector(".mos-data").textContent);
      view.mosPinned = null;
      const scale = view.querySelector(".mos-scale");
      scale.value = "responsibility";
      paint(view, scale.value);
      show(view, view.querySelector(`.mos-token[data-index="${view.mosData.first}"]`));
    }
  }
  const changes = { childList: true, subtree: true, attributeFilter: ["data-id"] };
  new MutationObserver(open).observe(document.documentElement, changes);
  open();
  markCut();
})();
