"use strict";
// The same iteration as torch_sinkhorn_attn, for small matrices in a browser. No library, no build step.
// Names are those of docs/design.md: S scores, u and v potentials, a and b masses, P the plan.

const Transport = (() => {
  // log(sum(exp(x))); -Infinity where nothing is finite.
  function logSumExp(values) {
    const top = values.reduce((x, y) => Math.max(x, y), -Infinity);
    if (top === -Infinity) return -Infinity;
    let sum = 0;
    for (const x of values) sum += Math.exp(x - top);
    return top + Math.log(sum);
  }

  const sum = (values) => values.reduce((x, y) => x + y, 0);

  // Scores with the dustbin's row and column last: `score` for every token, 0 in the corner.
  function augmented(scores, score) {
    const rows = scores.map((row) => [...row, score]);
    rows.push([...new Array(scores[0].length).fill(score), 0]);
    return rows;
  }

  /** The plan of a score matrix.
   *
   * scores: n rows of m numbers, before division by epsilon.
   * epsilon: entropic regularisation, positive, in the units of the scores.
   * iterations: T + R, each a column half-step, then a row half-step. 0 is one row half-step: softmax.
   * dustbin: null, or the score of "unmatched" for every row and column.
   *
   * Returns {plan, u, v, rowMass, colMass, rowSums, colSums, history}: the plan is (n + 1) x (m + 1) with a dustbin, its
   * row and column last. history[t] is the largest error of a column after t iterations, as a part of its mass.
   */
  function solve(scores, { epsilon = 1, iterations = 22, dustbin = null } = {}) {
    if (!(epsilon > 0)) throw new RangeError(`epsilon=${epsilon} must be positive`);
    const n = scores.length, m = scores[0].length;
    const S = (dustbin === null ? scores : augmented(scores, dustbin)).map((row) => row.map((x) => x / epsilon));
    // Without a dustbin every query gives 1 and every key takes n / m. With one every token has mass 1, and each
    // dustbin can hold all of the other side.
    const a = S.map((_, i) => (i < n ? 1 : m));
    const b = S[0].map((_, j) => (dustbin === null ? n / m : j < m ? 1 : n));
    const u = new Array(S.length).fill(0), v = new Array(S[0].length).fill(0);
    const columnStep = () => S[0].forEach((_, j) => { v[j] = Math.log(b[j]) - logSumExp(S.map((row, i) => row[j] + u[i])); });
    const rowStep = () => S.forEach((row, i) => { u[i] = Math.log(a[i]) - logSumExp(row.map((x, j) => x + v[j])); });
    const planNow = () => S.map((row, i) => row.map((x, j) => Math.exp(x + u[i] + v[j])));
    const columnSums = (plan) => plan[0].map((_, j) => sum(plan.map((row) => row[j])));
    const error = () => Math.max(...columnSums(planNow()).map((x, j) => Math.abs(x - b[j]) / b[j]));
    rowStep();
    const history = [error()];
    if (iterations > 0) u.fill(0);
    for (let t = 0; t < iterations; t++) {
      columnStep();
      rowStep();
      history.push(error());
    }
    const plan = planNow();
    return { plan, u, v, rowMass: a, colMass: b, rowSums: plan.map(sum), colSums: columnSums(plan), history };
  }

  /** Softmax over each row, for comparison; with a dustbin over the keys and the dustbin. */
  function softmax(scores, { epsilon = 1, dustbin = null } = {}) {
    return scores.map((row) => {
      const x = (dustbin === null ? row : [...row, dustbin]).map((s) => s / epsilon);
      const total = logSumExp(x);
      return x.map((s) => Math.exp(s - total));
    });
  }

  /** Scores of points in the plane: minus half the squared distance, the larger the nearer. */
  function pointScores(queries, keys) {
    return queries.map(([x, y]) => keys.map(([p, q]) => -((x - p) ** 2 + (y - q) ** 2) / 2));
  }

  return { solve, softmax, pointScores };
})();

if (typeof module !== "undefined") module.exports = Transport;
