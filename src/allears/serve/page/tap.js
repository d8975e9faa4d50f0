// Runs on the audio thread. Input 0: the microphone. Input 1: all that the page plays. Output 0: the result, if it is
// to be heard. Both inputs of a moment go out together in frames, so that they stay in time with each other.

const BUFFERED_S = 0.08; // of the result, before it is played
const MOST_BUFFERED_S = 0.4; // more than this is dropped: it would be heard late

class Tap extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.size = options.processorOptions.frame;
    this.begin();
    this.waiting = [];
    this.buffered = 0;
    this.hear = false;
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      if (data.hear !== undefined) {
        this.hear = data.hear;
        this.waiting = [];
        this.buffered = 0;
        this.playing = false;
      }
      if (data.near && this.hear) {
        this.waiting.push(data.near);
        this.buffered += data.near.length;
        while (this.buffered > MOST_BUFFERED_S * sampleRate) this.buffered -= this.waiting.shift().length;
      }
    };
  }

  begin() {
    this.mic = new Float32Array(this.size);
    this.reference = new Float32Array(this.size);
    this.filled = 0;
  }

  process(inputs, outputs) {
    const out = outputs[0][0];
    this.playResult(out);
    for (let channel = 1; channel < outputs[0].length; channel++) outputs[0][channel].set(out);
    for (let i = 0; i < out.length; i++) {
      this.mic[this.filled] = mean(inputs[0], i);
      this.reference[this.filled] = mean(inputs[1], i) + out[i];
      if (++this.filled === this.size) {
        const { mic, reference } = this;
        this.port.postMessage({ mic, reference }, [mic.buffer, reference.buffer]);
        this.begin();
      }
    }
    return true;
  }

  playResult(out) {
    if (!this.playing && this.buffered > BUFFERED_S * sampleRate) this.playing = true;
    let at = 0;
    while (this.playing && at < out.length) {
      const next = this.waiting[0];
      if (!next) {
        this.playing = false;
        break;
      }
      const taken = Math.min(next.length, out.length - at);
      out.set(next.subarray(0, taken), at);
      at += taken;
      this.buffered -= taken;
      if (taken === next.length) this.waiting.shift();
      else this.waiting[0] = next.subarray(taken);
    }
  }
}

function mean(channels, index) {
  let sum = 0;
  for (const channel of channels) sum += channel[index];
  return channels.length ? sum / channels.length : 0;
}

registerProcessor("tap", Tap);
