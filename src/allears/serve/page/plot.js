// A signal as it comes: level, waveform, spectrogram; eight seconds that move to the left, 10 ms a column.

const COLUMNS = 800, WAVE_ROWS = 96, ROWS = 128, FFT = 512;
const LOWEST_DB = -85, HIGHEST_DB = 0;
const COLOURS = colours();

export class Panel {
  constructor(parent, title, id, rate) {
    this.hop = Math.round(rate / 100);
    this.history = new Float32Array(FFT);
    this.rest = new Float32Array(0);
    this.columns = [];
    this.peak = -100;
    const panel = document.createElement("section");
    panel.className = "panel";
    panel.id = id;
    panel.innerHTML = `<div class="head"><h2></h2><meter min="-60" max="0" low="-60" high="-6" optimum="-30"></meter>
      <span class="db">–</span></div><canvas class="wave" width="${COLUMNS}" height="${WAVE_ROWS}"></canvas>
      <canvas class="spectrum" width="${COLUMNS}" height="${ROWS}"></canvas>
      <div class="axis"><span>8 s ago</span><span>spectrum: 0 to ${rate / 2000} kHz, upwards</span><span>now</span></div>`;
    panel.querySelector("h2").textContent = title;
    parent.append(panel);
    this.meter = panel.querySelector("meter");
    this.meter.setAttribute("aria-label", `Level: ${title}`);
    this.meter.value = -60;
    this.db = panel.querySelector(".db");
    this.wave = panel.querySelector(".wave").getContext("2d");
    this.spectrum = panel.querySelector(".spectrum").getContext("2d", { willReadFrequently: false });
    this.pixels = this.spectrum.createImageData(1, ROWS);
  }

  push(samples) {
    const all = new Float32Array(this.rest.length + samples.length);
    all.set(this.rest);
    all.set(samples, this.rest.length);
    let at = 0;
    for (; at + this.hop <= all.length; at += this.hop) {
      const hop = all.subarray(at, at + this.hop);
      this.history.copyWithin(0, this.hop);
      this.history.set(hop, FFT - this.hop);
      this.columns.push({ low: Math.min(...hop), high: Math.max(...hop), energy: energy(hop), power: power(this.history) });
    }
    this.rest = all.slice(at);
    if (this.columns.length > COLUMNS) this.columns.splice(0, this.columns.length - COLUMNS);
  }

  // Once for each picture of the browser.
  draw() {
    const count = this.columns.length;
    if (!count) return;
    for (const context of [this.wave, this.spectrum]) {
      const { canvas } = context;
      context.globalCompositeOperation = "copy";
      context.drawImage(canvas, -count, 0);
      context.globalCompositeOperation = "source-over";
    }
    this.columns.forEach((column, index) => this.drawColumn(column, COLUMNS - count + index));
    const mean = this.columns.reduce((sum, column) => sum + column.energy, 0) / count / this.hop;
    this.peak = Math.max(10 * Math.log10(mean + 1e-10), this.peak - 0.6 * count);
    this.meter.value = this.peak;
    this.db.textContent = this.peak < -90 ? "silent" : `${this.peak.toFixed(0)} dB`;
    this.columns = [];
  }

  drawColumn({ low, high, power }, x) {
    const middle = WAVE_ROWS / 2, scale = (value) => middle - middle * Math.max(-1, Math.min(1, value));
    this.wave.fillStyle = "#7fd6c8";
    this.wave.fillRect(x, scale(high), 1, Math.max(1, scale(low) - scale(high)));
    const { data } = this.pixels;
    for (let row = 0; row < ROWS; row++) {
      const bin = 2 * (ROWS - 1 - row);
      const db = 10 * Math.log10(Math.max(power[bin], power[bin + 1]) + 1e-12);
      const share = Math.round(255 * Math.max(0, Math.min(1, (db - LOWEST_DB) / (HIGHEST_DB - LOWEST_DB))));
      data.set(COLOURS[share], 4 * row);
    }
    this.spectrum.putImageData(this.pixels, x, 0);
  }
}

export function energy(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return sum;
}

const WINDOW = Float32Array.from({ length: FFT }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * (i + 0.5)) / FFT));

// |X|^2 of a windowed stretch, relative to a full-scale sine's.
function power(samples) {
  const re = new Float32Array(FFT), im = new Float32Array(FFT);
  for (let i = 0, j = 0; i < FFT; i++) {
    re[j] = samples[i] * WINDOW[i];
    let bit = FFT >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j |= bit;
  }
  for (let size = 2; size <= FFT; size *= 2) {
    const half = size / 2, turn = (-2 * Math.PI) / size;
    for (let k = 0; k < half; k++) {
      const c = Math.cos(turn * k), s = Math.sin(turn * k);
      for (let a = k; a < FFT; a += size) {
        const b = a + half, x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
  const scale = (4 / FFT) ** 2;
  return Float32Array.from({ length: FFT / 2 }, (_, k) => scale * (re[k] * re[k] + im[k] * im[k]));
}

// Dark blue, violet, orange, yellow: brighter is louder.
function colours() {
  const stops = [[5, 9, 11], [28, 22, 92], [122, 28, 109], [220, 80, 60], [250, 160, 50], [252, 250, 190]];
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1), at = Math.min(stops.length - 2, Math.floor(place)), share = place - at;
    return [0, 1, 2].map((c) => Math.round(stops[at][c] * (1 - share) + stops[at + 1][c] * share)).concat(255);
  });
}
