// Loaded into NNI's manager (node --require) before its own code runs.
//
// NNI 3.0 listens on every interface, without a password, and has no setting for it. Its process may also outlive the
// one that started it, and writes a list of all experiments to the home folder. These are mended here, from outside.
'use strict';

const net = require('net');
const os = require('os');

const settings = JSON.parse(process.env.ZSKD_NNI_MANAGER);
delete process.env.ZSKD_NNI_MANAGER;
// Not for the processes that the manager starts.
if (settings.node_options === null) {
    delete process.env.NODE_OPTIONS;
} else {
    process.env.NODE_OPTIONS = settings.node_options;
}

// The part of the address that nobody else knows is on the command line, which every user of the machine can read.
process.title = 'nni-manager';

// A local trial ends itself when this process is gone.
process.env.ZSKD_NNI_MANAGER_PID = String(process.pid);

os.homedir = () => settings.home;

if (settings.host !== null) {
    const listen = net.Server.prototype.listen;
    net.Server.prototype.listen = function (...given) {
        const last = given[given.length - 1];
        const done = typeof last === 'function' ? [last] : [];
        const first = given[0];
        if (first === undefined || first === null || typeof first === 'function') {
            return listen.call(this, { port: 0, host: settings.host }, ...done);
        }
        if (typeof first === 'number' || (typeof first === 'string' && /^\d+$/.test(first))) {
            return listen.call(this, { port: Number(first), host: settings.host }, ...done);
        }
        if (typeof first === 'object' && first.port !== undefined && first.path === undefined) {
            return listen.call(this, { ...first, host: settings.host }, ...done);
        }
        return listen.apply(this, given);  // a socket in the file system, an open handle
    };
}

// The tuner has ten seconds to start, which on a busy machine is too little for importing NNI.
const Module = require('module');
const load = Module._load;
Module._load = function (request, ...rest) {
    const loaded = load.call(this, request, ...rest);
    if (request === './tuner_command_channel' && loaded.getTunerServer) {
        Module._load = load;
        const server = loaded.getTunerServer();
        server.init = () => new Promise((resolve, reject) => {
            const late = new Error(`The tuner did not connect in ${settings.patience} seconds.`);
            const timer = setTimeout(() => reject(late), 1000 * settings.patience);
            server.connect.promise.then(() => { clearTimeout(timer); resolve(); }, reject);
        });
    }
    return loaded;
};

const parent = process.ppid;
const watch = setInterval(() => {
    if (process.ppid !== parent) {
        clearInterval(watch);
        process.kill(process.pid, 'SIGTERM');  // NNI stops its trials and its tuner on it
    }
}, 500);
watch.unref();
