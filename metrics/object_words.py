"""Words by which captions name COCO's 80 categories; ambiguous ones (glass, bat, plant) in their likelier sense."""

_PEOPLE = """person people man men woman women boy boys girl girls child children kid kids baby babies toddler guy guys
lady ladies player players skier skiers snowboarder surfer surfers skateboarder biker cyclist rider riders worker
workers crowd batter pitcher catcher umpire couple family passenger passengers pedestrian pedestrians"""

_OWN = {
    "person": _PEOPLE,
    "bicycle": "bicycle bicycles bike bikes",
    "car": "car cars van vans suv taxi cab sedan",
    "motorcycle": "motorcycle motorcycles motorbike motorbikes scooter",
    "airplane": "airplane airplanes plane planes jet aircraft airliner",
    "bus": "bus buses",
    "train": "train trains locomotive",
    "truck": "truck trucks pickup",
    "boat": "boat boats ship ships canoe kayak sailboat sailboats ferry",
    "bird": "bird birds duck ducks seagull pigeon parrot goose geese",
    "cat": "cat cats kitten kittens",
    "dog": "dog dogs puppy puppies",
    "horse": "horse horses pony",
    "sheep": "sheep lamb lambs",
    "cow": "cow cows bull cattle calf",
    "teddy bear": "teddy teddies",
    "couch": "couch couches sofa sofas",
    "potted plant": "plant plants",
    "dining table": "table tables desk",
    "tv": "tv tvs television monitor screen",
    "cell phone": "phone phones cellphone smartphone",
    "sports ball": "ball balls football soccer",
    "baseball bat": "bat bats",
    "baseball glove": "glove mitt",
    "tennis racket": "racket racquet rackets",
    "wine glass": "glass glasses wineglass",
    "cup": "cup cups mug mugs",
    "handbag": "handbag purse bag",
    "suitcase": "suitcase suitcases luggage",
    "refrigerator": "refrigerator fridge",
    "hair drier": "hairdryer drier",
    "donut": "donut donuts doughnut doughnuts",
    "knife": "knife knives",
    "sandwich": "sandwich sandwiches burger",
    "bench": "bench benches",
    "toothbrush": "toothbrush toothbrushes",
    "frisbee": "frisbee frisbees disc",
    "surfboard": "surfboard surfboards",
    "skis": "ski skis",
    "mouse": "mouse mice",
}


def phrases(category: str) -> list[str]:
    """Lower-case words or phrases that name a category: its synonyms here, else its own name and the plural.

    >>> phrases("zebra"), phrases("red circle")
    (['zebra', 'zebras'], ['red circle', 'red circles'])
    """
    category = category.lower()
    return _OWN[category].split() if category in _OWN else [category, f"{category}s"]
