// The live page: one WebSocket of docs/live.md, a canvas and what stands beside
// it. State that tests and curious people may look at is window.live.

import {Curves} from '/static/curves.js';
import {Grid} from '/static/grid.js';

const HEADER = 36;
const KINDS = {1: 'image/jpeg', 2: 'image/webp'};
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get('token');
const headers = token ? {Authorization: `Bearer ${token}`} : {};

const live = window.live = {
  socket: null, hello: null, session: null, frames: 0, frame: null,
  latencies: [], answers: [], events: {}, errors: [], reconnects: 0,
  upload: null, paused: false, ended: false,
};

const grid = new Grid($('grid'));
const curves = new Curves($('curves'), {
  made_fps: {label: 'frames a second, made', digits: 0, unit: ''},
  shown_fps: {label: 'frames a second, shown', digits: 1, unit: ''},
  made_ms: {label: 'latency of a block', digits: 0, unit: ' ms'},
  saturation: {label: 'saturation', digits: 3, unit: ''},
  sharpness: {label: 'sharpness', digits: 0, unit: ''},
  motion: {label: 'motion, % a frame', digits: 2, unit: ''},
});

function connect() {
  const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
  const query = token ? `?token=${encodeURIComponent(token)}` : '';
  const socket = new WebSocket(`${scheme}://${location.host}/v1/stream${query}`);
  socket.binaryType = 'arraybuffer';
  live.socket = socket;
  socket.onmessage = ({data}) => {
    if (typeof data === 'string') hear(JSON.parse(data));
    else show(data);
  };
  socket.onclose = ({reason}) => {
    live.session = null;
    if (live.ended) {
      veil(`${live.ended}. Restart begins anew`);
      return;
    }
    const wait = RETRY_MS[Math.min(live.reconnects, RETRY_MS.length - 1)];
    live.reconnects += 1;
    tell('bad', `not connected${reason ? `: ${reason}` : ''}; trying again`);
    veil('connecting again');
    setTimeout(connect, wait);
  };
}

function command(told) {
  if (live.socket?.readyState === WebSocket.OPEN) {
    live.socket.send(JSON.stringify(told));
  }
}

function start() {
  live.pending = new Map();
  live.numbers = [{number: 0, prompt: $('prompt').value}];
  live.shown = -1;
  live.paused = false;
  $('pause').textContent = 'Pause';
  curves.clear();
  grid.clear(live.hello.steps);
  const told = {
    type: 'start',
    prompt: $('prompt').value || live.hello.prompts[0],
    seed: Number($('seed').value) || 0,
  };
  if ($('mode').value !== live.hello.mode) told.mode = $('mode').value;
  if (live.upload) told.upload = live.upload;
  command(told);
}

const hears = {
  hello(event) {
    live.hello = event;
    $('pipeline').textContent =
      `${event.pipeline}, ${event.height}x${event.width} at ${event.fps} ` +
      `fps, ${event.steps} steps, ${event.order}`;
    if (!$('prompt').value) $('prompt').value = event.prompts[0];
    $('video').width = event.width;
    $('video').height = event.height;
    $('video').classList.toggle('small', event.height <= 256);
    fill($('examples'), event.prompts);
    if ($('mode').options.length !== event.modes.length) {
      fill($('mode'), event.modes);
      $('mode').value = event.mode;
    }
    $('mode').title = event.reason;
    $('chips').replaceChildren(...event.prompts.map((prompt) => {
      const chip = document.createElement('button');
      chip.type = 'button';
      chip.textContent = prompt;
      chip.onclick = () => {
        $('prompt').value = prompt;
        change();
      };
      return chip;
    }));
    // An upload of an earlier server is not known to this one.
    if (live.reconnects) live.upload = null;
    start();
  },
  queued(event) {
    tell('', `waiting, place ${event.place}`);
    veil(`waiting for a place: ${event.place} in the queue`);
  },
  preparing() {
    const compiling = live.hello.state === 'compiling';
    tell('', 'preparing');
    veil(compiling ? 'compiling, once; later starts are quicker' : 'preparing');
  },
  started(event) {
    live.session = event.session;
    $('caption').textContent = event.prompt;
    note(event.notes);
    tell('live', `live, mode ${event.mode}`);
  },
  block(event) {
    const span = 1000 * event.frames / live.hello.fps;
    const before = live.last ?? event.prompt;
    live.last = event.prompt;
    curves.add({...event, ...event.measures}, event.prompt !== before);
    grid.add(event, span);
  },
  prompt(event) {
    live.numbers.push({number: event.number, prompt: event.prompt});
    live.pending.set(event.number, live.asked.shift());
    note(event.notes);
  },
  prompted(event) {
    grid.prompted(event.number, event.from_block);
    answer(`shows from block ${event.from_block} on`);
  },
  changed(event) {
    live.answers.push(event.latency_ms);
  },
  paused() {
    live.paused = true;
    $('pause').textContent = 'Go on';
    tell('', 'paused');
  },
  resumed() {
    live.paused = false;
    $('pause').textContent = 'Pause';
    tell('live', 'live');
  },
  ended(event) {
    if (event.message) tell('bad', event.message);
    // Nobody may be looking: who does has a button.
    if (['time', 'stalled'].includes(event.code)) live.ended = event.message;
  },
  error(event) {
    live.errors.push(event);
    if (live.asked.length) live.asked.shift();
    answer(event.message, true);
    if (event.code === 'full') {
      veil(event.message);
      setTimeout(() => live.hello && start(), 5000);
    }
  },
  pong() {},
};

function hear(event) {
  live.events[event.type] = (live.events[event.type] || 0) + 1;
  hears[event.type]?.(event);
}

live.asked = [];

// Frames are decoded in order; one that is late gives way to the next.
let decoding = Promise.resolve();

function show(data) {
  const view = new DataView(data);
  const frame = {
    length: view.getUint16(6), block: view.getUint32(8),
    frame: view.getUint32(12), prompt: view.getUint32(16),
    dropped: view.getUint32(20), due: view.getFloat64(24),
  };
  const picture = new Blob(
    [new Uint8Array(data, frame.length || HEADER)],
    {type: KINDS[view.getUint8(5)]});
  decoding = decoding.then(async () => {
    const bitmap = await createImageBitmap(picture);
    $('video').getContext('2d').drawImage(bitmap, 0, 0);
    bitmap.close();
    live.frames += 1;
    live.frame = frame;
    // It holds: the next loss is answered at once again.
    if (frame.frame > 2 * live.hello.fps) live.reconnects = 0;
    veil(null);
    grid.play(frame.block);
    $('clock').textContent =
      `block ${frame.block} · frame ${frame.frame} · ${frame.due.toFixed(1)} s`;
    if (frame.prompt === live.shown) return;
    live.shown = frame.prompt;
    const told = live.numbers.find((n) => n.number === frame.prompt);
    if (told) $('caption').textContent = told.prompt;
    const asked = live.pending.get(frame.prompt);
    if (asked === undefined) return;
    const latency = performance.now() - asked;
    live.latencies.push(latency);
    for (const number of live.pending.keys()) {
      if (number <= frame.prompt) live.pending.delete(number);
    }
    answer(`first changed frame after ${(latency / 1000).toFixed(2)} s ` +
      `(block ${frame.block})`);
  }).catch((error) => live.errors.push({message: String(error)}));
}

function change() {
  const prompt = $('prompt').value.trim();
  if (!prompt || !live.session) return;
  live.asked.push(performance.now());
  answer('on its way');
  command({type: 'prompt', prompt, hurry: $('hurry').checked});
}

function fill(element, values) {
  element.replaceChildren(...values.map((value) => new Option(value, value)));
}

function tell(kind, text) {
  $('state').className = kind;
  $('state').textContent = text;
}

function veil(text) {
  $('veil').hidden = text === null;
  if (text !== null) $('veil-text').textContent = text;
}

function answer(text, bad = false) {
  $('answer').textContent = text;
  $('answer').style.color = bad ? 'var(--bad)' : '';
}

function note(notes) {
  $('note').textContent = notes.join('; ');
}

$('prompt-form').onsubmit = (event) => {
  event.preventDefault();
  change();
};
$('pause').onclick = () => command({type: live.paused ? 'resume' : 'pause'});
const restart = () => {
  live.ended = false;
  if (live.socket?.readyState === WebSocket.OPEN) start();
  else if (live.socket?.readyState === WebSocket.CLOSED) connect();
};
$('restart').onclick = restart;
$('mode').onchange = restart;
$('fullscreen').onclick = () => document.fullscreenElement
  ? document.exitFullscreen() : $('stage').requestFullscreen();
$('upload').onchange = async () => {
  const [file] = $('upload').files;
  live.upload = null;
  if (!file) return;
  answer('uploading');
  const reply = await fetch('/v1/uploads', {
    method: 'POST', body: file,
    headers: {...headers, 'Content-Type': file.type || 'image/unknown'},
  });
  const told = await reply.json();
  if (!reply.ok) {
    answer(told.message, true);
    return;
  }
  live.upload = told.upload;
  note(told.notes);
  answer(`goes on from ${told.frames} frame${told.frames > 1 ? 's' : ''}`);
  start();
};
$('download').onclick = async () => {
  if (!live.session) return;
  answer('writing the video');
  const reply = await fetch(`/v1/sessions/${live.session}/video.mp4`, {headers});
  if (!reply.ok) {
    answer((await reply.json()).message, true);
    return;
  }
  const link = document.createElement('a');
  link.href = URL.createObjectURL(await reply.blob());
  link.download = 'hiar.mp4';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  answer('downloaded');
};

connect();
