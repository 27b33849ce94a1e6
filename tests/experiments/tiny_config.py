"""The demo, cut down to what a test needs."""

from experiments.configs import digits


def get_config():
    config = digits.get_config()
    config.data.test = "test[:50]"
    config.data.validation = "train[1257:1287]"
    config.train.num_steps = 12
    config.train.save_every = 5
    config.train.log_every = 4
    config.train.batch_size = 16
    config.adapt.batch_size = 20
    config.adapt.chunk_size = 10
    methods = config.methods
    del methods["augmented"], methods["memo"], methods["rotation_memo_augmented"]
    methods.rotation.copies = 2
    methods.rotation.num_steps = 2
    methods.rotation.learning_rate = (0.01, 0.03)
    methods.rotation_online.copies = 2
    methods.rotation_online.learning_rate = (0.003,)
    return config
