// Puts the results of the site's search in order: what a page is called and what it is for come before what it mentions, and
// guides before notebooks. The page's own script asks `Fuse` for them; the real one still finds what is misspelt.
window.Fuse = class {
  static COMMON = new Set("a an and are as be by can cannot do does for from get how i in into is it my of on or the there this to use want what where which will with".split(" "));
  static KINDS = { Home: 2, Start: 3, Guide: 3, Planner: 2.5, Practices: 1.2, Reference: 1.6, Notebook: 1 };

  constructor(index, options) {
    this.real = new window.Fuse.Real(index, options);
    this.sections = index.map((found) => ({ found, own: this.lower(found.section || found.title), page: this.lower(found.title),
                                            words: this.lower(found.words || ""), text: this.lower(found.text) }));
  }

  lower(text) { return { text: text.toLowerCase(), words: new Set(text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || []) }; }

  // how well a word is met: said as it is, in another form, within a longer name
  met(word, { text, words }, whole) {
    if (words.has(word)) return whole;
    const stem = word.length > 5 ? word.replace(/(ization|izing|ize[ds]?|ations?|ings?|ed|es|s)$/, "") : word.replace(/s$/, "");
    if (stem.length > 2 && [...words].some((other) => other.startsWith(stem))) return whole / 2;
    return word.length > 2 && text.includes(word) ? whole / 4 : 0;
  }

  score(query, asked, { found, own, page, words, text }) {
    let sum = 0, all = 0;
    for (const word of asked) {
      const best = Math.max(this.met(word, own, 10), this.met(word, page, found.section ? 4 : 10), this.met(word, words, 9), this.met(word, text, 2));
      sum += best;
      all += best > 0;
    }
    const named = own.text === query || `${page.text}.${own.text}` === query;
    const exact = named ? (found.kind === "Reference" ? 20 : 4) : 1;
    return all ? sum * (all / asked.length) ** 2 * exact * (found.section ? 1 : 1.3) * (window.Fuse.KINDS[found.kind] || 1) : 0;
  }

  search(text, { limit }) {
    const query = text.toLowerCase().trim(), every = query.match(/[\p{L}\p{N}_]+/gu) || [];
    const telling = every.filter((word) => !window.Fuse.COMMON.has(word));
    const asked = telling.length ? telling : every;
    const ranked = this.sections.map((section) => ({ item: section.found, score: asked.length ? this.score(query, asked, section) : 0 }))
      .filter(({ score }) => score > 0).sort((a, b) => b.score - a.score);
    const times = {};
    const shown = ranked.filter(({ item }) => (times[item.title + item.kind] = (times[item.title + item.kind] || 0) + 1) <= 2);
    if (!shown.length) return this.real.search(text, { limit });
    return shown.slice(0, limit).map(({ item }) => ({ item: { ...item, title: item.title === item.kind ? item.title : `${item.title} · ${item.kind}`, text: this.excerpt(item.text, asked) } }));
  }

  // the beginning, or what stands around the first word that was asked for
  excerpt(text, asked) {
    const places = asked.map((word) => text.toLowerCase().indexOf(word)).filter((place) => place >= 0);
    const start = places.length ? Math.min(...places) : 0;
    return start < 120 ? text.slice(0, 200) : "…" + text.slice(start - 60, start + 140);
  }

  static Real = window.Fuse;
};
