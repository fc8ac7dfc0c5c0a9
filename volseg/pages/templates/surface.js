// The surface of labelled voxels: surface nets (Gibson, MICCAI 1998), smoothed without shrinking
// (Taubin, SIGGRAPH 1995).

const MAX_SURFACE_CELLS = 30_000_000;

// Return the lowest and the highest index along each axis of every label: number → [low, high].
function boxesOf(voxels, [nx, ny, nz]) {
  const boxes = new Map();
  for (let k = 0, at = 0; k < nz; k++) {
    for (let j = 0; j < ny; j++) {
      for (let i = 0; i < nx; i++, at++) {
        const number = voxels[at];
        if (!number) continue;
        const box = boxes.get(number);
        if (!box) boxes.set(number, [[i, j, k], [i, j, k]]);
        else [i, j, k].forEach((value, axis) => {
          box[0][axis] = Math.min(box[0][axis], value);
          box[1][axis] = Math.max(box[1][axis], value);
        });
      }
    }
  }
  return boxes;
}

// Return the points (index coordinates) and triangles of the surface of one label.
function surfaceOf(voxels, [nx, ny], number, [low, high]) {
  const cells = low.map((start, axis) => high[axis] - start + 2), corners = cells.map((n) => n + 1);
  const cornerAt = (i, j, k) => i + corners[0] * (j + corners[1] * k), cellAt = (i, j, k) => i + cells[0] * (j + cells[1] * k);
  const inside = new Uint8Array(corners[0] * corners[1] * corners[2]);
  for (let k = low[2]; k <= high[2]; k++) for (let j = low[1]; j <= high[1]; j++) for (let i = low[0]; i <= high[0]; i++) {
    inside[cornerAt(i - low[0] + 1, j - low[1] + 1, k - low[2] + 1)] = voxels[i + nx * (j + ny * k)] === number ? 1 : 0;
  }
  const vertexOf = new Int32Array(cells[0] * cells[1] * cells[2]).fill(-1), points = [], triangles = [];
  const value = (c, i, j, k) => inside[cornerAt(c[0] + i, c[1] + j, c[2] + k)];
  for (let k = 0; k < cells[2]; k++) for (let j = 0; j < cells[1]; j++) for (let i = 0; i < cells[0]; i++) {
    const cell = [i, j, k], sum = [0, 0, 0];
    let crossed = 0;
    for (let axis = 0; axis < 3; axis++) for (let b = 0; b < 2; b++) for (let c = 0; c < 2; c++) {
      const from = [0, 0, 0];
      from[(axis + 1) % 3] = b;
      from[(axis + 2) % 3] = c;
      const to = from.slice();
      to[axis] = 1;
      if (value(cell, ...from) === value(cell, ...to)) continue;
      crossed += 1;
      for (let n = 0; n < 3; n++) sum[n] += (from[n] + to[n]) / 2;
    }
    if (!crossed) continue;
    vertexOf[cellAt(i, j, k)] = points.length / 3;
    for (let n = 0; n < 3; n++) points.push(cell[n] + low[n] - 1 + sum[n] / crossed);
  }
  for (let k = 0; k < cells[2]; k++) for (let j = 0; j < cells[1]; j++) for (let i = 0; i < cells[0]; i++) {
    const here = inside[cornerAt(i, j, k)];
    for (let axis = 0; axis < 3; axis++) {
      const next = [i, j, k];
      if (!next[(axis + 1) % 3] || !next[(axis + 2) % 3]) continue; // outside, where nothing crosses
      next[axis] += 1;
      if (inside[cornerAt(...next)] === here) continue;
      const quad = [[0, 0], [-1, 0], [-1, -1], [0, -1]].map(([b, c]) => {
        const cell = [i, j, k];
        cell[(axis + 1) % 3] += b;
        cell[(axis + 2) % 3] += c;
        return vertexOf[cellAt(...cell)];
      });
      const [p, q, r, s] = here ? quad : quad.reverse();
      triangles.push(p, q, r, p, r, s);
    }
  }
  return { points: moved(moved(points, triangles, 0.5), triangles, -0.53), triangles: Uint32Array.from(triangles) };
}

// Move every point by a part of the way to the mean of its neighbours.
function moved(points, triangles, part) {
  const sums = new Float64Array(points.length), counts = new Float64Array(points.length / 3);
  for (let t = 0; t < triangles.length; t += 3) for (let side = 0; side < 3; side++) {
    const a = triangles[t + side], b = triangles[t + (side + 1) % 3];
    counts[a] += 1;
    for (let n = 0; n < 3; n++) sums[3 * a + n] += points[3 * b + n];
  }
  return Float32Array.from(points, (value, n) => (counts[Math.floor(n / 3)] ? value + part * (sums[n] / counts[Math.floor(n / 3)] - value) : value));
}

// Convert index coordinates to mm with the rows of an affine.
function toMm(points, affine) {
  const mm = new Float32Array(points.length);
  for (let p = 0; p < points.length; p += 3) for (let n = 0; n < 3; n++) {
    mm[p + n] = affine[n][0] * points[p] + affine[n][1] * points[p + 1] + affine[n][2] * points[p + 2] + affine[n][3];
  }
  return mm;
}
