// Opens the microphone, plays the voice, sends both to the server, and shows and plays what comes back.

import { Panel, energy } from "./plot.js";
import { Stream } from "./stream.js";

const RATE = 16000; // of the network, which knows no more of a sound than that
const FRAME_S = 0.02, KEPT_S = 30, ACTIVE_DB = -50, ATTENUATION_S = 2;
const RAW = { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: 1 };

const $ = (id) => document.getElementById(id);
const panels = {};
let running = null;
let kept = null;
let listening = null;

for (const [id, title] of [["played", "Played"], ["heard", "Microphone: before"], ["result", "After"]]) {
  panels[id] = new Panel($("panels"), title, id, RATE);
}
requestAnimationFrame(function draw() {
  Object.values(panels).forEach((panel) => panel.draw());
  requestAnimationFrame(draw);
});

$("start").onclick = () => (running ? stop("Stopped.") : start().catch((error) => fail(explain(error))));
$("play").onchange = () => running?.loudness();
$("loudness").oninput = () => running?.loudness();
$("hear").onchange = () => running?.tap.port.postMessage({ hear: $("hear").checked });
$("before").onclick = () => listen("mic");
$("after").onclick = () => listen("near");

async function start() {
  show("starting", "Asking for the microphone …");
  $("start").disabled = true;
  listening?.close();
  if (!navigator.mediaDevices) throw new Error("A browser gives the microphone only on localhost, or over https.");
  const context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
  let microphone = null;
  try {
    microphone = await navigator.mediaDevices.getUserMedia({ audio: RAW });
    await context.audioWorklet.addModule("tap.js");
    const voice = await context.decodeAudioData(await (await fetch("voice.flac")).arrayBuffer());
    await context.resume();
    running = connect(context, microphone, voice);
  } catch (error) {
    microphone?.getTracks().forEach((track) => track.stop());
    await context.close();
    throw error;
  } finally {
    $("start").disabled = false;
  }
  $("start").textContent = "Stop";
}

function connect(context, microphone, voice) {
  const tap = new AudioWorkletNode(context, "tap", {
    numberOfInputs: 2,
    numberOfOutputs: 1,
    outputChannelCount: [1],
    processorOptions: { frame: FRAME_S * RATE },
  });
  const gain = new GainNode(context), player = new AudioBufferSourceNode(context, { buffer: voice, loop: true });
  context.createMediaStreamSource(microphone).connect(tap, 0, 0);
  player.connect(gain);
  gain.connect(context.destination);
  gain.connect(tap, 0, 1); // what is played, tapped behind the loudness
  tap.connect(context.destination);
  tap.port.postMessage({ hear: $("hear").checked });
  player.start();

  const attenuation = new Attenuation();
  kept = { mic: new Kept(), near: new Kept() };
  const stream = new Stream(RATE, {
    ready: (told) => {
      running.told = `Running: ${told.model}, ${told.engine}.`;
      show("running", running.told);
      $("latency").textContent = `for 20 ms; the method lags ${told.latency_ms} ms`;
    },
    near: (near, facts) => {
      panels.result.push(near);
      kept.near.push(near);
      attenuation.after(near);
      tell(facts, attenuation.db());
      document.body.dataset.received = kept.near.total;
      if ($("hear").checked) tap.port.postMessage({ near: near.slice() });
    },
    end: (message, code) => {
      if (running?.stream === stream) stop(null);
      if (code !== 1000) fail(`${message.replace(/\.$/, "")}. (${code})`);
    },
  });
  tap.port.onmessage = ({ data: { mic, reference } }) => {
    if (!stream.send(mic, reference)) {
      if (stream.behind) show("running", `${running.told} The server is behind: ${stream.left_out_s.toFixed(1)} s left out.`);
      return;
    }
    panels.played.push(reference);
    panels.heard.push(mic);
    kept.mic.push(mic);
    attenuation.before(mic, reference);
    document.body.dataset.sent = kept.mic.total;
  };
  microphone.getTracks()[0].onended = () => fail("The microphone is gone.");
  const loudness = () => {
    gain.gain.value = $("play").checked ? 10 ** ($("loudness").value / 20) : 0;
  };
  loudness();
  return { context, microphone, stream, tap, loudness };
}

function stop(message) {
  const { context, microphone, stream } = running;
  running = null;
  stream.close();
  microphone.getTracks().forEach((track) => track.stop());
  context.close();
  $("start").textContent = "Start";
  $("before").disabled = $("after").disabled = !kept?.near.total;
  if (message) show("idle", message);
}

function fail(message) {
  if (running) stop(null);
  show("failed", message);
}

function show(state, message) {
  document.body.dataset.state = state;
  $("status").textContent = message;
}

function explain(error) {
  if (error.name === "NotAllowedError") return "The microphone was not allowed.";
  if (error.name === "NotFoundError") return "There is no microphone.";
  return error.message;
}

function tell({ delay_ms, voice, took_ms }, db) {
  $("attenuation").textContent = db === null ? "–" : (Math.round(10 * db) / 10 + 0).toFixed(1);
  $("delay").textContent = Number.isNaN(delay_ms) ? "–" : delay_ms.toFixed(0);
  $("voice").textContent = Number.isNaN(voice) ? "–" : voice > 0.5 ? "yes" : "no";
  $("took").textContent = took_ms.toFixed(1);
}

function listen(which) {
  listening?.close();
  const samples = kept[which].all();
  const context = (listening = new AudioContext({ sampleRate: RATE }));
  const buffer = context.createBuffer(1, samples.length, RATE);
  buffer.copyToChannel(samples, 0);
  const player = new AudioBufferSourceNode(context, { buffer });
  player.connect(context.destination);
  player.onended = () => context.state !== "closed" && context.close();
  player.start();
}

// The last half minute.
class Kept {
  parts = [];
  total = 0;
  length = 0;

  push(samples) {
    this.parts.push(samples.slice());
    this.total += samples.length;
    this.length += samples.length;
    while (this.length > KEPT_S * RATE) this.length -= this.parts.shift().length;
  }

  all() {
    const samples = new Float32Array(Math.max(1, this.length));
    let at = 0;
    for (const part of this.parts) {
      samples.set(part, at);
      at += part.length;
    }
    return samples;
  }
}

// Energy of the microphone over that of the result, over the newest 2 s of hops of 10 ms in which something was played
// at most half a second before.
class Attenuation {
  hop = RATE / 100;
  mic = [];
  near = [];
  active = [];
  rest = { mic: new Float32Array(0), reference: new Float32Array(0), near: new Float32Array(0) };
  since = Infinity;

  before(mic, reference) {
    this.mic.push(...this.energies("mic", mic));
    for (const value of this.energies("reference", reference)) {
      this.since = 10 * Math.log10(value / this.hop + 1e-12) > ACTIVE_DB ? 0 : this.since + 1;
      this.active.push(this.since < 50);
    }
  }

  after(near) {
    this.near.push(...this.energies("near", near));
    const most = ATTENUATION_S * 100;
    const old = this.near.length - most;
    if (old > 0) for (const list of [this.mic, this.near, this.active]) list.splice(0, old);
  }

  db() {
    let before = 0, after = 0, count = 0;
    this.near.forEach((value, index) => {
      if (!this.active[index]) return;
      before += this.mic[index];
      after += value;
      count++;
    });
    return count < 50 || before / count / this.hop < 1e-8 ? null : 10 * Math.log10(before / (after + 1e-9));
  }

  energies(name, samples) {
    const all = new Float32Array(this.rest[name].length + samples.length), found = [];
    all.set(this.rest[name]);
    all.set(samples, this.rest[name].length);
    let at = 0;
    for (; at + this.hop <= all.length; at += this.hop) found.push(energy(all.subarray(at, at + this.hop)));
    this.rest[name] = all.slice(at);
    return found;
  }
}
