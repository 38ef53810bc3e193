// What a job published, to take away.

import { key, request } from "./api.js";
import { alertBox, fill, h } from "./dom.js";
import { bytes } from "./format.js";

// With a key the browser has to hold the whole file before it can save it.
const LARGEST_HELD = 200_000_000;

/**
 * @param {string} id
 * @param {{path: string, bytes: number}[]} files the manifest
 */
export function downloads(id, files) {
  const trouble = h("div");
  const folder = (name) => files.filter((file) => file.path.startsWith(`${name}/`)).reduce((sum, file) => sum + file.bytes, 0);
  const single = (path) => files.find((file) => file.path === path)?.bytes ?? 0;
  const gguf = files.find((file) => file.path.startsWith("gguf/"))?.path ?? "";
  const offered = [
    ["adapter.zip", "Adapter", "a LoRA in PEFT's format, with the report", folder("adapter"), `/v1/jobs/${id}/adapter.zip`],
    ...pointsOf(files).map((point) => [
      `point-${point}.zip`, `Model of point ${point}`, "a step on the way, larger than the last", folder(`points/${point}`), `/v1/jobs/${id}/model.zip?point=${point}`,
    ]),
    ["model.zip", "Whole model", "safetensors, configuration and tokenizer", folder("model"), `/v1/jobs/${id}/model.zip`],
    ["quantized.zip", "Model in fewer bits", "the whole model, quantized", folder("quantized"), `/v1/jobs/${id}/quantized.zip`],
    [gguf.split("/").at(-1), "GGUF file", "the whole model for llama.cpp", single(gguf), `/v1/jobs/${id}/files/${gguf}`],
    ["factored.zip", "Model in factors", "weights of low rank as two factors, and the file that loads it", folder("factored"), `/v1/jobs/${id}/factored.zip`],
    ["report.html", "Report", "to read, print and pass on", single("report.html"), `/v1/jobs/${id}/files/report.html`],
    ["report.json", "Report as JSON", "every step and number", single("report.json"), `/v1/jobs/${id}/files/report.json`],
    ["README.md", "Model card", "for the Hub", single("README.md"), `/v1/jobs/${id}/files/README.md`],
  ].filter(([, , , size]) => size > 0);
  const items = offered.map(([name, label, what, size, url]) =>
    h("li", {}, link(name, label, size, url, trouble), h("span", { class: "muted" }, ` ${what}, ${bytes(size)}`)),
  );
  const header = key.get() ? ' -H "Authorization: Bearer $C2I_KEY"' : "";
  const commands = offered.filter(([name]) => name.endsWith(".zip")).map(([name, , , , url]) => `curl -fL${header} -o ${name} '${location.origin}${url}'`);
  return h(
    "section",
    { class: "card", "aria-labelledby": "downloads" },
    h("h2", { id: "downloads" }, "Download"),
    h("ul", { class: "downloads" }, items),
    trouble,
    h("details", {}, h("summary", {}, "From a terminal"), h("pre", { tabindex: 0 }, h("code", {}, commands.join("\n")))),
  );
}

/** The rounds of `compress` whose models lie beside the last one's, which is the whole model. */
function pointsOf(files) {
  const numbers = files.map((file) => /^points\/(\d+)\//.exec(file.path)).filter(Boolean).map(([, number]) => Number(number));
  return [...new Set(numbers)].sort((a, b) => a - b);
}

/** Without a key, a link. With one the page asks, as a link sends no header; what is large is left to curl. */
function link(name, label, size, url, trouble) {
  if (!key.get()) return h("a", { href: url, download: name }, label);
  if (size > LARGEST_HELD) return h("span", {}, `${label} (too large for a browser with a key: use the command below)`);
  const button = h("button", { type: "button", class: "link", onclick: save }, label);
  async function save() {
    button.disabled = true;
    fill(trouble);
    try {
      const blob = await (await request(url)).blob();
      const source = URL.createObjectURL(blob);
      h("a", { href: source, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(source), 60_000);
    } catch (error) {
      fill(trouble, alertBox(error));
    } finally {
      button.disabled = false;
    }
  }
  return button;
}
