// What several views know about the service: its atlas and its models, asked for once.
import { ask } from "./api.js";

let summary = null, models = null;

export const facts = {
  /** The atlas' summary: experts, clusters, colours; null where a bundle or one model is served without its run. */
  run() {
    summary ??= ask("/atlas/summary").catch(error => {
      summary = null;
      if (error.status === 404) return null;
      throw error;
    });
    return summary;
  },
  /** What is served: its experts and its indexes. */
  models() {
    models ??= ask("/models").catch(error => { models = null; throw error; });
    return models;
  },
  forget() { summary = models = null; },
};

/** Key words of each expert by its name, for legends. */
export async function wordsOfExperts() {
  const found = await facts.run().catch(() => null);
  return Object.fromEntries((found?.experts ?? []).map(expert => [`expert-${expert.index}`, expert.keywords]));
}

/** Words that show what the data are about: of large clusters of different experts whose most typical caption is one word. */
export async function someWords(count = 8) {
  const found = await facts.run().catch(() => null);
  if (!found) return [];
  const names = [], sorted = [...found.clusters].sort((one, other) => other.size - one.size);
  const queues = found.experts.map(expert => sorted.filter(cluster => cluster.expert === expert.index && cluster.keywords[0] && (cluster.caption === cluster.keywords[0] || found.clusters.every(other => other.caption !== other.keywords[0]))));
  for (let place = 0; names.length < count && queues.some(queue => queue[place]); place++) {
    for (const queue of queues) if (queue[place] && names.length < count && !names.includes(queue[place].keywords[0])) names.push(queue[place].keywords[0]);
  }
  return names;
}
