// A chat with the server this page came from. Text is only ever set as text, never as markup.

const at = (id) => document.getElementById(id);
const chat = at("chat");
let messages = [];
let request = null; // the AbortController of the running answer
let key = "";

function headers() {
  const made = { "Content-Type": "application/json" };
  if (key) made.Authorization = `Bearer ${key}`;
  return made;
}

function add(parent, kind, text = "", tag = "div") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  parent.append(made);
  chat.scrollTop = chat.scrollHeight;
  return made;
}

async function refusal(response) {
  if (response.status === 401) at("keys").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw new Error(await refusal(response));
  return response.json();
}

// --- statistics ---------------------------------------------------------------------------

function bytes(count) {
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(2)} GiB` : `${(count / 2 ** 20).toFixed(0)} MiB`;
}

async function showStats() {
  const stats = await get("stats");
  const accepted = stats.accepted_by_depth.reduce((a, b) => a + b, 0);
  at("accepted").textContent = stats.verifies ? (accepted / stats.verifies).toFixed(2) : "–";
  at("hits").textContent = stats.experts ? `${(100 * stats.experts.hit_rate).toFixed(1)} %` : "all in RAM";
  const bound = stats.budget && stats.budget.ram;
  const used = bytes(stats.resident_bytes ?? stats.peak_rss_bytes);
  at("ram").textContent = bound ? `${used} of ${bytes(bound)}` : `${used}, no bound`;
}

// --- answers ------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const found = rest.split("\n\n");
    rest = found.pop();
    for (const event of found) {
      if (!event.startsWith("data: ")) continue; // a sign of life
      const data = event.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function body() {
  const system = at("system").value.trim();
  const tools = at("tools").value.trim();
  const asked = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("most").value),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if (tools) asked.tools = JSON.parse(tools);
  return JSON.stringify(asked);
}

async function answer() {
  request = new AbortController();
  at("send").disabled = true;
  at("stop").hidden = false;
  const turn = add(chat, "turn assistant waiting");
  const said = { role: "assistant", content: "" };
  const calls = [];
  let thought = null;
  const text = add(turn, "text");
  const poll = setInterval(() => showStats().catch(() => {}), 1000);
  try {
    const begun = performance.now();
    let first = 0;
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: body(),
      signal: request.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices.length ? event.choices[0].delta : {};
      const now = performance.now();
      if (!first && event.usage && event.usage.completion_tokens) {
        first = now;
        at("first").textContent = `${(now - begun).toFixed(0)} ms`;
      }
      if (delta.reasoning_content) {
        thought ??= add(turn, "reasoning");
        turn.prepend(thought);
        thought.textContent += delta.reasoning_content;
      }
      if (delta.content) text.textContent = said.content += delta.content;
      for (const call of delta.tool_calls ?? []) {
        calls.push(call);
        add(turn, "call", `${call.function.name}(${call.function.arguments})`);
      }
      const count = event.usage ? event.usage.completion_tokens : 0;
      if (first && count > 1 && now > first) {
        at("tps").textContent = ((1e3 * (count - 1)) / (now - first)).toFixed(1);
      }
      chat.scrollTop = chat.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") add(chat, "error", error.message);
  } finally {
    clearInterval(poll);
    turn.classList.remove("waiting");
    request = null;
    at("send").disabled = false;
    at("stop").hidden = true;
  }
  if (calls.length) said.tool_calls = calls.map(({ id, type, function: f }) => ({ id, type, function: f }));
  if (said.content || calls.length) messages.push(said);
  else turn.remove();
  if (calls.length) askResults(turn, calls);
  await showStats().catch(() => {});
}

// The page has no tools of its own: whoever sits before it says what each one returned.
function askResults(turn, calls) {
  const form = add(turn, "results", "", "form");
  const inputs = calls.map((call) => {
    const label = add(form, "", `${call.function.name} returned`, "label");
    const input = add(label, "", "", "input");
    input.value = '{"status": "ok"}';
    return input;
  });
  add(form, "", "Give results", "button");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (request) return;
    calls.forEach((call, index) => {
      messages.push({ role: "tool", tool_call_id: call.id, content: inputs[index].value });
      add(chat, "turn tool", `${call.function.name}: ${inputs[index].value}`);
    });
    form.remove();
    await answer();
  });
}

// --- what people do -----------------------------------------------------------------------

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || request) return;
  at("text").value = "";
  for (const open of chat.querySelectorAll("form.results")) open.remove();
  messages.push({ role: "user", content: text });
  add(chat, "turn user", text);
  await answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => request && request.abort());
at("new").addEventListener("click", () => {
  if (request) request.abort();
  messages = [];
  chat.replaceChildren();
});
at("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  at("keys").hidden = true;
  begin();
});

async function begin() {
  try {
    at("model").textContent = (await get("v1/models")).data[0].id;
    const tools = await get("tools.json");
    if (tools.tools.length) at("tools").value = JSON.stringify(tools.tools, null, 1);
    await showStats();
  } catch (error) {
    add(chat, "error", error.message);
  }
}

begin();
