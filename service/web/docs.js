// The routes of openapi.json, to read: parameters, bodies, answers, and what their fields are.

import { get } from "./api.js";
import { alertBox, fill, h } from "./dom.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** The page's body. @param {any} document openapi.json */
function reference(document) {
  const routes = Object.entries(document.paths).flatMap(([path, operations]) =>
    METHODS.filter((method) => operations[method]).map((method) => ({ path, method, ...operations[method] })),
  );
  const tags = [...new Set(routes.map((route) => route.tags?.[0] ?? "other"))];
  const key = document.components.securitySchemes
    ? "Requests need an API key: Authorization: Bearer KEY."
    : "Requests need no key here.";
  return [
    h("p", {}, key),
    tags.map((tag) => group(tag, routes.filter((route) => (route.tags?.[0] ?? "other") === tag))),
    h("h2", { class: "group" }, "Bodies"),
    Object.entries(document.components.schemas).map(([name, schema]) => body(name, schema)),
  ];
}

function group(tag, routes) {
  return h("section", { "aria-label": tag }, h("h2", { class: "group" }, tag), routes.map(entry));
}

function entry({ path, method, description, parameters, requestBody, responses }) {
  const [first, ...more] = (description ?? "").split("\n\n");
  return h(
    "details",
    { class: "card route" },
    h("summary", {}, h("code", {}, h("strong", {}, method.toUpperCase()), ` ${path}`), " ", h("span", { class: "muted" }, code(first))),
    more.map((text) => h("p", {}, code(text))),
    parameters && table(["Parameter", "In", "Type", ""], parameters.map((one) => [one.name, one.in, type(one.schema), code(one.description ?? "")])),
    requestBody && h("p", {}, "Body: ", content(requestBody.content)),
    table(
      ["Status", "Body", ""],
      Object.entries(responses).map(([status, answer]) => [status, content(answer.content), code(answer.description ?? "")]),
    ),
  );
}

function body(name, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([field, of]) => [
    field,
    [type(of), required.has(field) ? "" : h("span", { class: "muted" }, ` default ${JSON.stringify(of.default ?? null)}`)],
    code(of.description ?? ""),
  ]);
  const text = (schema.description ?? "").split("\n\n").map((part) => h("p", {}, code(part)));
  const values = schema.enum && h("p", {}, schema.enum.map((value) => JSON.stringify(value)).join(", "));
  return h(
    "details",
    { class: "card route", id: `schema-${name}` },
    h("summary", {}, h("code", {}, h("strong", {}, name))),
    text,
    values,
    rows.length > 0 && table(["Field", "Type", ""], rows),
  );
}

/** The schema of a body, or else its media types. */
function content(media) {
  if (!media) return "none";
  const schema = media["application/json"]?.schema;
  return schema ? type(schema) : Object.keys(media).join(", ");
}

/** What a value may be; what has a name is a link to it. */
function type(schema) {
  if (!schema) return "any";
  if (schema.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return h("a", { href: `#schema-${name}` }, name);
  }
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.flatMap((option, i) => [i ? " or " : "", type(option)]).flat();
  if (schema.enum || "const" in schema) return (schema.enum ?? [schema.const]).map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return ["list of ", type(schema.items)].flat();
  const limits = ["minimum", "maximum", "minLength", "maxLength"].filter((limit) => limit in schema);
  return [schema.type ?? "any", ...limits.map((limit) => `, ${limit} ${schema[limit]}`)].join("");
}

/** `text` in backticks as code. */
function code(text) {
  return text.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
}

function table(names, rows) {
  if (!rows.length) return null;
  const head = h("tr", {}, names.map((name) => (name ? h("th", { scope: "col" }, name) : h("td"))));
  const lines = rows.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, first)), cells.map((cell) => h("td", {}, cell))));
  return h("div", { class: "rows", tabindex: 0, role: "region", "aria-label": names[0] }, h("table", { class: "examples" }, h("thead", {}, head), h("tbody", {}, lines)));
}

/** A link to a body opens it. */
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target) {
    target.open = true;
    target.querySelector("summary").focus();
    target.scrollIntoView();
  }
}

const root = document.getElementById("routes");
try {
  fill(root, reference(await get("/openapi.json")));
  unfold();
} catch (error) {
  fill(root, alertBox(error));
}
addEventListener("hashchange", unfold);
