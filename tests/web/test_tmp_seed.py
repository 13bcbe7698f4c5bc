from tests.nodes.comfy_server import PACK
def test_seed(page):
    found = page.page.evaluate("""() => { const n = LiteGraph.createNode('K5TrainingSettings'); app.graph.add(n);
      return n.widgets.map(w => [w.name, w.label ?? '', String(w.value).slice(0, 20)]); }""")
    print(found)
    print(page.page.evaluate("""async () => (await (await fetch('/object_info/K5TrainingSettings')).json()).K5TrainingSettings.input.optional.seed"""))
