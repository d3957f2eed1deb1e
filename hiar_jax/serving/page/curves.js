// Numbers over the last blocks, each a line of its own.

const KEPT = 160;

export class Curves {
  // names: {key: {label, digits, unit, mark}}; mark: a value drawn as a line.
  constructor(parent, names) {
    this.curves = {};
    for (const [key, about] of Object.entries(names)) {
      const box = document.createElement('div');
      box.className = 'curve';
      box.innerHTML = '<p><span></span><b></b></p><canvas></canvas>';
      box.querySelector('span').textContent = about.label;
      parent.append(box);
      this.curves[key] = {
        ...about,
        values: [],
        switches: [],
        told: box.querySelector('b'),
        canvas: box.querySelector('canvas'),
      };
      box.querySelector('b').id = `now-${key}`;
    }
  }

  clear() {
    for (const curve of Object.values(this.curves)) {
      curve.values = [];
      curve.switches = [];
    }
  }

  // numbers: {key: value}; switched: whether a prompt began to show here.
  add(numbers, switched) {
    for (const [key, curve] of Object.entries(this.curves)) {
      const value = numbers[key];
      if (value === undefined || value === null) continue;
      curve.values.push(value);
      curve.switches.push(switched);
      if (curve.values.length > KEPT) {
        curve.values.shift();
        curve.switches.shift();
      }
      curve.told.textContent = `${value.toFixed(curve.digits)}${curve.unit}`;
      this.draw(curve);
    }
  }

  draw(curve) {
    const canvas = curve.canvas;
    const density = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * density;
    canvas.height = height * density;
    const c = canvas.getContext('2d');
    c.scale(density, density);
    const marks = curve.mark === undefined ? [] : [curve.mark];
    const most = Math.max(...curve.values, ...marks) * 1.1 || 1;
    // A short row is drawn over the whole width as well, from the left on.
    const span = Math.max(40, curve.values.length);
    const x = (i) => 2 + (width - 4) * i / (span - 1);
    const y = (v) => height - 2 - (height - 4) * v / most;
    c.strokeStyle = '#2a3140';
    c.strokeRect(.5, .5, width - 1, height - 1);
    c.strokeStyle = '#7fd962';
    curve.switches.forEach((switched, i) => {
      if (!switched) return;
      c.beginPath();
      c.moveTo(x(i), 1);
      c.lineTo(x(i), height - 1);
      c.stroke();
    });
    if (marks.length) {
      c.strokeStyle = '#8b94a7';
      c.setLineDash([3, 3]);
      c.beginPath();
      c.moveTo(1, y(curve.mark));
      c.lineTo(width - 1, y(curve.mark));
      c.stroke();
      c.setLineDash([]);
    }
    c.strokeStyle = '#59c2ff';
    c.lineWidth = 1.5;
    c.beginPath();
    curve.values.forEach((v, i) => c.lineTo(x(i), y(v)));
    c.stroke();
  }
}
