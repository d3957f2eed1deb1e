// The grid of blocks and denoising steps: what was done to which square, and in
// which order. A block's turns arrive when it is finished and are shown one
// after the other while the next one is made.

const SHOWN = 12;
const COLOURS = {
  done: '#33507a', D: '#59c2ff', C: '#ffb454', DC: '#59c2ff', line: '#2a3140',
  new: '#7fd962', text: '#8b94a7', play: '#e6e9f0',
};

export class Grid {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear(4);
    const paint = (now) => {
      this.advance(now);
      requestAnimationFrame(paint);
    };
    requestAnimationFrame(paint);
  }

  clear(steps) {
    this.steps = steps;
    this.state = new Map(); // 'block,step' -> done
    this.turns = [];
    this.active = new Map(); // 'block,step' -> verb
    this.playing = -1;
    this.newest = 0;
    this.prompts = new Map(); // number -> first block
    this.next = 0;
    this.pace = 150;
  }

  // event: a `block` of the protocol; span: ms until the next one is expected.
  add(event, span) {
    this.steps = event.steps;
    // What could not be shown in time is done at once.
    while (this.turns.length) this.step();
    event.turns.forEach((blocks, turn) => {
      const stages = blocks.length;
      const squares = [];
      blocks.forEach((block, stage) => {
        if (block < 0) return;
        const verb = event.verbs[turn][stage];
        const per = Math.max(1, Math.floor(event.steps / stages));
        const last = stage === stages - 1 ? event.steps : (stage + 1) * per;
        for (let step = stage * per; step < last; step++) {
          squares.push([block, step, verb]);
        }
      });
      this.turns.push(squares);
    });
    this.pace = Math.max(30, .8 * span / event.turns.length);
    this.next = 0;
    for (const key of this.state.keys()) {
      if (Number(key.split(',')[0]) < event.block - 2 * SHOWN) {
        this.state.delete(key);
      }
    }
  }

  prompted(number, block) {
    this.prompts.set(number, block);
    if (this.prompts.size > 32) {
      this.prompts.delete(this.prompts.keys().next().value);
    }
  }

  play(block) {
    this.playing = block;
  }

  step() {
    for (const [key, verb] of this.active) {
      if (verb.startsWith('D')) this.state.set(key, true);
    }
    this.active = new Map();
    for (const [block, step, verb] of this.turns.shift() || []) {
      this.active.set(`${block},${step}`, verb);
      this.newest = Math.max(this.newest, block);
    }
  }

  advance(now) {
    if (this.turns.length && now >= this.next) {
      this.step();
      this.next = now + this.pace;
    }
    this.draw();
  }

  draw() {
    const density = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (this.canvas.width !== Math.round(width * density)) {
      this.canvas.width = Math.round(width * density);
    }
    if (this.canvas.height !== Math.round(height * density)) {
      this.canvas.height = Math.round(height * density);
    }
    const c = this.canvas.getContext('2d');
    c.setTransform(density, 0, 0, density, 0, 0);
    c.clearRect(0, 0, width, height);
    const left = 46, top = 4, bottom = 20;
    const w = (width - left - 4) / SHOWN;
    const h = (height - top - bottom) / this.steps;
    const first = Math.max(0, this.newest - SHOWN + 2);
    c.font = '11px system-ui, sans-serif';
    c.textBaseline = 'middle';
    for (let step = 0; step < this.steps; step++) {
      c.fillStyle = COLOURS.text;
      c.textAlign = 'right';
      c.fillText(`step ${step + 1}`, left - 6, top + h * (step + .5));
      for (let i = 0; i < SHOWN; i++) {
        const key = `${first + i},${step}`;
        const verb = this.active.get(key);
        c.fillStyle = verb ? COLOURS[verb]
          : this.state.get(key) ? COLOURS.done : 'transparent';
        c.fillRect(left + w * i + 1, top + h * step + 1, w - 2, h - 2);
        c.strokeStyle = COLOURS.line;
        c.strokeRect(left + w * i + 1.5, top + h * step + 1.5, w - 3, h - 3);
      }
    }
    c.textAlign = 'center';
    for (let i = 0; i < SHOWN; i++) {
      const block = first + i;
      const playing = block === this.playing;
      c.fillStyle = playing ? COLOURS.play : COLOURS.text;
      c.fillText(block, left + w * (i + .5), height - bottom / 2 + 1);
      if (playing) c.fillRect(left + w * i + 2, height - 3, w - 4, 3);
    }
    c.strokeStyle = COLOURS.new;
    c.lineWidth = 2;
    for (const block of this.prompts.values()) {
      if (!block || block < first || block >= first + SHOWN) continue;
      const x = left + w * (block - first);
      c.beginPath();
      c.moveTo(x, top);
      c.lineTo(x, height - bottom + 4);
      c.stroke();
    }
    c.lineWidth = 1;
  }
}
