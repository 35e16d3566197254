// The page: a form, the conversation, and the worker that runs the model.

const byId = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let messages = [];
let answer; // the element of the reply that is being generated

for (const [name, value] of new URLSearchParams(location.search)) {
  if (["library", "bundle", "device", "tokens"].includes(name)) byId(name).value = value;
}

function send(task, data = {}) {
  byId("controls").disabled = true;
  byId("stop").disabled = task !== "chat";
  worker.postMessage({ task, ...data });
}

function finish(status) {
  byId("status").textContent = status;
  byId("controls").disabled = false;
  byId("stop").disabled = true;
}

function show(role, text) {
  const element = document.createElement("p");
  element.className = role;
  element.textContent = text;
  byId("conversation").append(element);
  return element;
}

const handlers = {
  status: ({ text }) => (byId("status").textContent = text),
  loaded: ({ name, context }) => {
    byId("message").disabled = byId("say").disabled = byId("test").disabled = false;
    finish(`${name}, ${context} tokens`);
  },
  text: ({ piece }) => (answer.textContent += piece),
  done: ({ text }) => {
    messages.push({ role: "assistant", content: text });
    finish("done");
  },
  tested: ({ count, failed }) => {
    for (const { text, expected, got } of failed) {
      show("error", `${text}: expected ${expected}, got ${got}`);
    }
    const result = failed.length ? `${failed.length} of ${count} differ` : "as at export";
    finish(`golden prompts: ${result}`);
  },
  error: ({ text }) => {
    if (messages.at(-1)?.role === "user") messages.pop(); // it has no reply
    finish(`error: ${text}`);
  },
};
worker.onmessage = ({ data }) => handlers[data.kind](data);
worker.onerror = (event) => finish(`error: ${event.message}`);

byId("loading").onsubmit = (event) => {
  event.preventDefault();
  const library = new URL(byId("library").value, document.baseURI).href;
  const bundle = new URL(byId("bundle").value, document.baseURI).pathname.replace(/\/$/, "");
  messages = [];
  byId("conversation").replaceChildren();
  send("load", { library, bundle, device: byId("device").value });
};

byId("chat").onsubmit = (event) => {
  event.preventDefault();
  const content = byId("message").value.trim();
  if (!content) return;
  byId("message").value = "";
  messages.push({ role: "user", content });
  show("user", content);
  answer = show("assistant", "");
  send("chat", { messages, maxTokens: Number(byId("tokens").value) });
};

byId("test").onclick = () => send("test");
byId("stop").onclick = () => worker.postMessage({ task: "stop" });
